"""LoRAs that nodes attach to a core MODEL, as files that the ranks merge into their weights.

Any LoRA loader leaves changes of weights ("patches") in the MODEL: for each weight, a strength and what it multiplies.
They are grouped by strength, so that a group has at most one change of each weight, and groups follow each other as the
changes of each weight do, since DoRA's depend on those before. A group's file is named after its content: a new
strength writes nothing, and the ranks know it again.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...ascend_runtime.checkpoints.faults import list_faults
from ...ascend_runtime.checkpoints.writing.writers import lay_out, starts, write_at
from ...ascend_runtime.errors import coded_error
from ...ascend_runtime.specs import LoraSpec
from . import refusals

NETWORK = "diffusion_model."  # before the names of the network's weights in a MODEL
FOLDER = "ascend_loras"  # in ComfyUI's temporary folder
MAX_BYTES = 16 * 2**30  # of files that are kept in it
KNOWN_MODELS = 64  # MODELs with other patches whose files are remembered
# The ends of keys in files for what an adapter of core's comfy.weight_adapter holds, in its order; None: no tensor.
LORA = ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "reshape_weight")
LOHA = ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale")
LOKR = ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale")
ADAPTERS = {"lora": LORA, "loha": LOHA, "lokr": LOKR}
OTHER_SHAPE = "that give weights another shape"

Patch = tuple[float, Any, float, Any, Any]  # strength, change, strength of the weight itself, offset, function
Group = dict[str, Tensor]  # tensors of a file, by key

_known: OrderedDict[tuple, tuple[LoraSpec, ...]] = OrderedDict()  # by the patches of a MODEL
_kept: OrderedDict[Path, int] = OrderedDict()  # files, with their bytes; the ones that were used last at the end
_digests = WeakTensorKeyDictionary()  # of the bytes of tensors, as long as these live


def loras_of(patcher: ModelPatcher) -> tuple[LoraSpec, ...]:
    """The LoRAs in a MODEL, as files for the ranks. Writes those that are not there yet to ComfyUI's temporary folder.

    Raises ValueError, which names the weights, for changes that the ranks cannot make.
    """
    if not patcher.patches:
        return ()
    state = patcher.patches_uuid, sum(map(len, patcher.patches.values()))
    specs = _known.get(state)
    if specs is None or not all(Path(spec.path).is_file() for spec in specs):
        specs = tuple(
            LoraSpec(path=str(_file_with(group)), strength=strength, misfits="skip")
            for strength, group in _groups(patcher.patches)
        )
        _known[state] = specs
    _known.move_to_end(state)
    while len(_known) > KNOWN_MODELS:
        _known.popitem(last=False)
    _remove_old({Path(spec.path) for spec in specs})
    return specs


def _groups(patches: dict[str, list[Patch]]) -> list[tuple[float, Group]]:
    """(strength, tensors of a file) of each group. Raises ValueError for patches that are no LoRA."""
    faults = defaultdict(list)
    groups: list[tuple[float, Group]] = []
    for key, listed in patches.items():
        used = 0  # of the groups; the next change of this weight comes after them
        for strength, change, of_weight, offset, function in listed:
            if fault := _fault(key, change, of_weight, offset, function):
                faults[fault].append(key)
            elif strength := float(strength):  # 0 changes nothing
                after = [number for number in range(used, len(groups)) if groups[number][0] == strength]
                number = after[0] if after else len(groups)
                if not after:
                    groups.append((strength, {}))
                groups[number][1].update(_tensors(key, change))
                used = number + 1
    if faults:
        raise ValueError(
            "Nodes have attached changes to this MODEL that the ranks, which hold its weights, cannot make: "
            f"{list_faults(faults)}. The ranks add LoRA, LoHa, LoKr, each with DoRA too, and whole differences. "
            f"{refusals.INSTEAD}"
        )
    return groups


def _fault(key: str, change: Any, of_weight: float, offset: Any, function: Any) -> str | None:
    """Why the ranks cannot make a change; None if they can."""
    if not key.startswith(NETWORK):
        return "outside of the network"
    if of_weight != 1.0:
        return "that scale weights (as merging of models does)"
    if offset is not None or function is not None:
        return "of a part of a weight, or through a function"
    if hasattr(change, "name"):
        roles = ADAPTERS.get(change.name)
        if roles is None or len(roles) != len(change.weights):
            return f"of the kind {change.name}"
        given = dict(zip(roles, change.weights))
        return OTHER_SHAPE if given.get("reshape_weight") is not None else None
    if isinstance(change, list):
        return "of another model's weights (as merging of models makes)"
    kind, values = ("diff", change) if len(change) == 1 else change
    if kind != "diff":
        return f"of the kind {kind}"
    return None if len(values) == 1 or not values[1].get("pad_weight") else OTHER_SHAPE


def _tensors(key: str, change: Any) -> Group:
    """The tensors of a change, by their keys in a file."""
    layer, bias = key.removesuffix(".weight"), key.endswith(".bias")
    if hasattr(change, "name"):
        given = zip(ADAPTERS[change.name], change.weights)
        made = {role: value for role, value in given if value is not None}
        return {f"{layer}.{role}": torch.as_tensor(value, device="cpu") for role, value in made.items()}
    difference = (change if len(change) == 1 else change[1])[0]
    return {f"{layer.removesuffix('.bias')}.diff_b" if bias else f"{layer}.diff": difference.cpu()}


def _file_with(group: Group) -> Path:
    """A file with these tensors. Raises ValueError if it cannot be written."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(group):
        tensor = group[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode() + _digest(tensor))
    path = Path(folder_paths.get_temp_directory()) / FOLDER / f"{digest.hexdigest()}.safetensors"
    if not path.is_file():
        try:
            _write(path, group)
        except OSError as error:
            raise coded_error(
                "AV-1316",
                f"The LoRAs of this MODEL cannot be written to {path.parent} ({error.strerror}), where the ranks would "
                "read them. Make room there, or start ComfyUI with another --temp-directory.",
            ) from error
    _kept[path] = path.stat().st_size
    _kept.move_to_end(path)
    return path


def _digest(tensor: Tensor) -> bytes:
    """Of the tensor's bytes. Nodes keep the tensors of a file, so that a new strength finds these again."""
    if tensor not in _digests:
        _digests[tensor] = hashlib.blake2b(_bytes(tensor), digest_size=16).digest()
    return _digests[tensor]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _write(path: Path, group: Group) -> None:
    """Makes the file under another name first, so that there is never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.safetensors")
    try:
        lay_out(unfinished, group)
        with unfinished.open("r+b", buffering=0) as file:
            for key, start in starts(unfinished).items():
                write_at(file.fileno(), group[key].detach(), start)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_old(used: set[Path]) -> None:
    """Removes files, first those that were used longest ago, while there are too many bytes."""
    for path in [path for path in _kept if path not in used]:
        if sum(_kept.values()) <= MAX_BYTES:
            return
        del _kept[path]
        path.unlink(missing_ok=True)
