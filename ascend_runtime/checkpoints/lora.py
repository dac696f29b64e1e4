"""LoRA files of a Wan transformer: which parameter each of their tensors changes, and how.

A low-rank pair makes a weight W + strength * alpha / rank * B @ A (Hu et al., arXiv 2106.09685; without an alpha the
fraction is 1, as in core ComfyUI), a whole difference D makes it W + strength * D. The layouts:

    diffusers, PEFT      transformer.blocks.0.attn1.to_q.lora_A.weight     .lora_B.weight
    the original's names diffusion_model.blocks.0.self_attn.q.lora_down.weight     .lora_up.weight .alpha .diff .diff_b
    kohya                lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight .alpha
    older diffusers      transformer.blocks.0.attn1.to_q.lora.down.weight  .lora.up.weight

A key means the same in all of them, or is in one alone: so each is understood by itself, with any prefix or none.
LoRAs of Wan 2.1's image-to-video models are used on Wan 2.2's, which have no CLIP: what changes the layers of CLIP's
image alone is left out there, as core ComfyUI does. Nothing else of a file is passed over.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..precision import is_finite
from .faults import listed
from .keys import to_diffusers_name
from .parts import Part
from .tensor_files import TensorFile, open_tensors

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]

PREFIX = re.compile(r"^(lora_unet__?|(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.)?)")
ROLES = {
    "lora_A.weight": "down", "lora_A.default.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down",
    "lora_B.weight": "up", "lora_B.default.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up",
    "alpha": "alpha", "diff": "diff", "diff_b": "diff",
}  # fmt: skip
# What the original calls its layers, and its parameters that are no layer's.
ATTENTION = [f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in ("q", "k", "v", "o", "norm_q", "norm_k")]
IMAGE_IN_A_BLOCK = [f"cross_attn.{layer}" for layer in ("k_img", "v_img", "norm_k_img")]
IN_A_BLOCK = [*ATTENTION, *IMAGE_IN_A_BLOCK, "ffn.0", "ffn.2", "norm3", "modulation"]
IMAGE_LAYERS = [f"img_emb.proj.{number}" for number in (0, 1, 3, 4)]
OUTSIDE = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
           "time_projection.1", "head.head", "head.modulation", "img_emb.emb_pos", *IMAGE_LAYERS]  # fmt: skip
FOR_AN_IMAGE = "of layers for CLIP's image, which this model lacks"


@dataclass(frozen=True)
class LowRank:
    """up: the key of B [out, rank]; down: that of A [rank, in]; a convolution's have more dims."""

    up: str
    down: str
    scale: float

    @property
    def keys(self) -> tuple[str, ...]:
        return self.up, self.down

    def add_to(self, weight: Tensor, file: TensorFile, part: Part, whole: tuple[int, ...], strength: float):
        """weight: fp32, the part of a tensor of the shape `whole` that is to be changed, in place."""
        up = file.read(self.up).flatten(1)[part[0]].to(weight)
        down = file.read(self.down).view(-1, *whole[1:])[(slice(None), *part[1:])].flatten(1).to(weight)
        weight += ((strength * self.scale) * (up @ down)).view_as(weight)


@dataclass(frozen=True)
class Difference:
    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def add_to(self, weight: Tensor, file: TensorFile, part: Part, whole: tuple[int, ...], strength: float):
        weight += strength * file.read(self.key, part).to(weight)


@dataclass(frozen=True)
class LoraFile:
    """What a file changes: by diffusers' names of the parameters. Equal while the file stays the same."""

    fingerprint: tuple[str, int, int]
    changes: dict[str, LowRank | Difference] = field(compare=False)

    @property
    def path(self) -> Path:
        return Path(self.fingerprint[0])


def fingerprint(path: str) -> tuple[str, int, int]:
    """Changes when the file does. Raises ValueError where there is none."""
    if not Path(path).is_file():
        raise ValueError(
            f"There is no LoRA {path}. Give the path of a .safetensors file; ComfyUI's LoRAs belong into models/loras."
        )
    state = Path(path).stat()
    return path, state.st_size, state.st_mtime_ns


def read_lora(path: str | Path, shapes: Shapes) -> LoraFile:
    """What the file changes of a network whose parameters have these whole shapes.

    What is for an image that the network does not see is left out, with a warning. Raises ValueError that lists by name
    what else is of no known kind or layer, incomplete, wrongly shaped, not finite or of whole numbers.
    """
    state, path = fingerprint(str(path)), Path(path)
    faults: dict[str, list[str]] = defaultdict(list)
    left_out: list[str] = []
    with open_tensors(path) as file:
        on_disk = file.shapes
        for key in on_disk:
            if not (file.dtype(key).is_floating_point or key.endswith(".alpha")):
                faults["that are no floating-point numbers"].append(f"{key} as {file.dtype(key)}")
        changes = {}
        for name, keys in _by_parameter(on_disk, shapes, faults, left_out).items():
            change = _change(name, keys, file, faults)
            if change is not None and _fits(change, on_disk, name, shapes[name], faults):
                changes[name] = change
        if not faults:
            faults["with NaN or infinite values"] += [key for key in on_disk if not is_finite(file.read(key).float())]
    if not changes:
        faults[f"{FOR_AN_IMAGE}, and no other"] += left_out
    _refuse(path, faults, on_disk)
    if left_out:
        logger.warning("The LoRA %s is used without %s.", path, listed({FOR_AN_IMAGE: left_out}))
    return LoraFile(state, changes)


def _by_parameter(on_disk: Shapes, shapes: Shapes, faults, left_out: list[str]) -> dict[str, dict[str, str]]:
    """The key of each role, by parameter; those for an image that the network does not see go to `left_out`."""
    known = {*shapes, *_image_parameters(shapes)}
    spellings, found = _spellings(known), defaultdict(dict)
    for key in on_disk:
        name, role = _parameter(key, spellings, known)
        if key.endswith(".dora_scale"):
            faults["of DoRA, which is not merged here"].append(key)
        elif role is None:
            faults["of no known kind"].append(key)
        elif name is None:
            faults["of no layer of this model"].append(key)
        elif name not in shapes:
            left_out.append(key)
        elif role in found[name]:
            faults["given twice"].append(f"{key} and {found[name][role]}")
        else:
            found[name][role] = key
    return found


def _parameter(key: str, spellings: dict[str, str], known: set[str]) -> tuple[str | None, str | None]:
    """The parameter that a key changes, and its role in that; each None where it is not known."""
    rest = PREFIX.sub("", key)
    for suffix, role in ROLES.items():
        if rest.endswith(f".{suffix}"):
            layer = spellings.get(rest.removesuffix(f".{suffix}"))
            names = (f"{layer}.bias",) if suffix == "diff_b" else (f"{layer}.weight", layer)
            return next((name for name in names if name in known), None), role
    return None, None


def _image_parameters(shapes: Shapes) -> Iterator[str]:
    """Those that a network of as many blocks has if it sees an image through CLIP."""
    layers = [*IMAGE_LAYERS, *(f"blocks.{block}.{layer}" for block in _blocks(shapes) for layer in IMAGE_IN_A_BLOCK)]
    for original in ["img_emb.emb_pos", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]:
        yield to_diffusers_name(original)


def _blocks(names: Iterable[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("blocks.")}


def _spellings(known: set[str]) -> dict[str, str]:
    """Diffusers' name of each layer, and of each parameter that is no layer's, by all names that it has in files."""
    own = {name.removesuffix(".weight").removesuffix(".bias") for name in known}
    blocks = _blocks(known)
    spelled = {name: name for name in own}
    for original in [*OUTSIDE, *(f"blocks.{block}.{layer}" for block in blocks for layer in IN_A_BLOCK)]:
        for name in (to_diffusers_name(f"{original}.weight").removesuffix(".weight"), to_diffusers_name(original)):
            if name in own:
                spelled[original] = name
    return spelled | {name.replace(".", "_"): layer for name, layer in spelled.items()}


def _change(name: str, keys: dict[str, str], file: TensorFile, faults) -> LowRank | Difference | None:
    if keys.keys() == {"diff"}:
        return Difference(keys["diff"])
    if not {"up", "down"} <= keys.keys() <= {"up", "down", "alpha"}:
        faults["that make no change together"].append(f"{' and '.join(keys.values())} (of {name})")
        return None
    scale = 1.0
    if "alpha" in keys:
        alpha = file.read(keys["alpha"])
        if alpha.numel() != 1:
            faults["of the wrong shape"].append(f"{keys['alpha']} is {list(alpha.shape)}, not one number")
            return None
        scale = alpha.item() / max(1, file.read(keys["down"]).shape[0])
    return LowRank(keys["up"], keys["down"], scale)


def _fits(change: LowRank | Difference, on_disk: Shapes, name: str, whole: tuple[int, ...], faults) -> bool:
    if isinstance(change, Difference):
        fits = on_disk[change.key] == whole
    else:
        up, down = on_disk[change.up], on_disk[change.down]
        matrices = min(len(up), len(down), len(whole)) > 1
        fits = matrices and (up[0], math.prod(up[1:]), math.prod(down[1:])) == (whole[0], down[0], math.prod(whole[1:]))
    if not fits:
        given = " and ".join(f"{key} {list(on_disk[key])}" for key in change.keys)
        faults["of the wrong shape"].append(f"{given} for {name} {list(whole)}")
    return fits


def _refuse(path: Path, faults: dict[str, list[str]], on_disk: Shapes) -> None:
    """Raises ValueError where there is a fault, or nothing in the file."""
    told = listed(faults)
    if told or not on_disk:
        raise ValueError(
            f"{path} is no LoRA for this model. Tensors {told or 'there are none'}. Nothing was changed. "
            "Take a LoRA of this Wan model in the layout of diffusers, kohya or ComfyUI (low-rank pairs with or "
            "without alpha, whole differences)."
        )
