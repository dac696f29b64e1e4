"""`python -m ascend_runtime convert SOURCE TARGET --to FORMAT`: writes a model in another layout."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from ..checkpoints.bounded import read_json
from ..checkpoints.faults import printable, shown
from ..checkpoints.opening import open_tensors
from ..checkpoints.paths import CALIBRATION, DEFAULTS, file_of
from ..checkpoints.states import states
from ..checkpoints.tokenizers import SPIECE, tokenizer_model
from ..checkpoints.writing.links import own_file, own_files, resolved
from ..checkpoints.writing.transfer import Move, fill, laid_out
from ..checkpoints.writing.unfinished import partial_folder, sync, unfinished
from ..checkpoints.writing.writers import WRITE_BYTES
from ..components.networks import whole_network
from ..errors import coded_error
from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE, VISION
from ..recognition.component import Component
from ..recognition.folders import STANDARD_NAMES, TRANSFORMERS, has_folder
from ..recognition.mindspeed import RELEASE, STAGE_FILE, TRACKER
from ..recognition.text_encoders import sees_images
from ..specs.models import WEIGHT_DTYPES
from .inspection import inspect
from .progress import ProgressDisplay

TARGET_DTYPES = dict(zip(WEIGHT_DTYPES, (None, torch.bfloat16, torch.float16, torch.float32)))
INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")
ABSENT = (None, None)  # the class in a pipeline's index of a part that it does not have


@dataclass
class ConversionPlan:
    """The files to write, by their paths in the target. root: the source's folder or file.

    dtype: of the weights; None keeps each one's own, bfloat16 for 8 bits. shard_size: of diffusers' files, as "5GB".
    """

    root: Path
    dtype: torch.dtype | None
    shard_size: str
    moves: dict[Path, dict[str, Move]] = field(default_factory=dict)  # weight file -> name in it -> its tensor
    texts: dict[Path, bytes] = field(default_factory=dict)
    copies: dict[Path, Path] = field(default_factory=dict)  # target file -> source file, copied unchanged
    folders: list[Path] = field(default_factory=list)  # source folders that are copied completely
    omitted: list[str] = field(default_factory=list)  # parts that are not converted, with the reason
    sources: list[Component] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The size of the weights in bytes."""
        return sum(move.made.nbytes for moves in self.moves.values() for move in moves.values())

    def copy(self, folder: Path, to: Path) -> None:
        """Plans to copy a folder in the source, or next to it. Raises ValueError if it contains a link that leads
        outside (see checkpoints/writing/links.py)."""
        self.folders.append(folder)
        around = self.root if folder.is_relative_to(self.root) else self.root.parent
        self.copies |= {to / name: file for name, file in own_files(folder, around).items()}

    def source(self) -> list[tuple]:
        """The states of all files that are read, to detect a change."""
        return [*(state for one in self.sources for state in one.fingerprint), *states(self.copies.values())]

    def digest(self) -> str:
        """A hash of what is written and how, to detect a plan of another version."""
        moves = [(str(path), name, *(place.key for place in move.places), str(move.made.dtype))
                 for path, moves in self.moves.items() for name, move in moves.items()]  # fmt: skip
        made = repr((WRITE_BYTES, moves, sorted(self.texts.items()), sorted(self.copies)))
        return hashlib.sha256(made.encode()).hexdigest()


def run(arguments: argparse.Namespace, progress: ProgressDisplay | None = None) -> int:
    """Converts a model and reports the result. Returns the exit status: 0 success, 1 error, 130 interrupted."""
    progress = progress or ProgressDisplay()
    source, target = (Path(path).expanduser().absolute() for path in (arguments.source, arguments.target))
    try:
        plan = planned(source, arguments.to, TARGET_DTYPES[arguments.dtype], arguments.shard_size, progress.begin)
        _report(plan, progress)
        identity = {
            "SOURCE": str(source), "--to": arguments.to, "--dtype": arguments.dtype,
            "--shard-size": arguments.shard_size, "what SOURCE holds": plan.source(),
            "what this version of the pack makes of it": [plan.digest()],
        }  # fmt: skip
        convert(plan, target, identity, progress)
    except ValueError as error:
        progress.refuse(error)
        return 1
    except OSError as error:  # such as a full disk
        progress.refuse(OSError(f"{error}. Fix that, or give another target; {_kept(target)}"))
        return 1
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted; {_kept(target)}", file=sys.stderr)
        return 130
    progress.end()
    files = [*plan.moves, *plan.texts, *plan.copies]
    print(f"{printable(str(target))}: {len(files)} files, {plan.nbytes / 1e9:.2f} GB of weights")
    return 0


def _report(plan: ConversionPlan, progress: ProgressDisplay) -> None:
    """Reports what will be written, and what is omitted."""
    progress.end()
    for why in plan.omitted:
        print(f"omitted: {printable(why)}", flush=True)
    files = len(plan.moves) + len(plan.texts) + len(plan.copies)
    progress.say(f"{files} files to write, {plan.nbytes / 1e9:.2f} GB of weights")


def _kept(target: Path) -> str:
    if os.path.isdir(partial_folder(target)):
        return "what was written is kept, and the same command continues from there"
    return "nothing was written"


def planned(
    source: Path,
    to: str,
    dtype: torch.dtype | None,
    shard_size: str,
    on_part: Callable[[str], None] = lambda part: None,
) -> ConversionPlan:
    """Plans a conversion without reading weights.

    dtype, shard_size: see `ConversionPlan`. on_part: called before each part is inspected.
    Raises ValueError if a part of the source is incomplete, or the layout supports no part.
    """
    plan = ConversionPlan(source, dtype, shard_size)
    parts = _parts(source, to, plan.omitted, on_part)
    plan.sources += parts.values()
    if to == "mindspeed":
        for part, component in parts.items():
            folder = component.family.layout.folders[part][0] if len(parts) > 1 else ""
            _plan_release(plan, Path(folder), part, component)
        _plan_own_files(plan, parts)
        return plan
    _plan_tokenizer(plan, parts)
    single = len(parts) == 1 and not (plan.copies or plan.texts)
    for part, component in parts.items():
        folder = Path("" if single else part)
        if component.folder and sees_images(component.folder):
            plan.copy(component.folder, folder)
            plan.omitted.append(f"{part}: copied unchanged, as it has a vision tower too")
        else:
            _plan_component(plan, folder, part, component)
    if not single:
        _plan_pipeline(plan, parts)
    _plan_own_files(plan, parts)
    return plan


def _parts(source: Path, to: str, omitted: list[str], on_part: Callable[[str], None]) -> dict[str, Component]:
    """The parts to convert. Adds the reasons for others to `omitted`."""
    parts, faults = {}, []
    for found in inspect(str(source), on_part):
        if found.component is None and found.fault is None:
            continue
        if to == "mindspeed" and found.part not in TRANSFORMERS:
            if found.component:
                omitted.append(f"{found.part}: MindSpeed-MM's layout has only transformers; use --to diffusers")
        elif found.part == VISION:
            omitted.append(f"{VISION}: diffusers has it only as a part of a whole text_encoder")
        elif found.component:  # `_moves` checks its weights; other faults, as a missing tokenizer, are accepted
            parts[found.part] = found.component
        elif found.part == "transformer_2" or has_folder(source, found.part):
            faults.append(f"{found.part}: {found.fault}")
        else:
            omitted.append(f"{found.part}: {found.fault}")
    if faults or not parts:
        raise ValueError("\n".join(faults or omitted))
    return parts


def _moves(part: str, component: Component, dtype: torch.dtype | None) -> list[Move]:
    """The tensors to write, in the network's order. Raises ValueError if weights are missing, do not fit, or are
    quantized."""
    if component.quantized is not None:
        raise coded_error(
            "AV-1305",
            f"{component.quantized.file} says that the {part} is quantized, which other formats do not support. "
            "Convert the model's bf16 or fp16 version.",
        )
    network = whole_network(component)
    places = component.places_in(network, whole=True)
    held = {}
    for shard in component.shards:
        with open_tensors(shard) as file:
            held |= {name: file.dtype(place.key) for name, place in places.items() if place.shard == shard}
    whole: dict[str, list[str]] = {}
    for name in network.state_dict():
        if name in places:
            whole.setdefault(component.part.published_name(name), []).append(name)
    moves = []
    for name, parts in whole.items():
        shape = places[parts[0]].shape
        shape = shape if len(parts) == 1 else (shape[0], sum(places[one].shape[1] for one in parts), *shape[2:])
        made = torch.empty(shape, dtype=_dtype(component, parts[0], held[parts[0]], dtype), device="meta")
        moves.append(Move(name, tuple(places[one] for one in parts), made))
    return moves


def _dtype(component: Component, name: str, held: torch.dtype, target: torch.dtype | None) -> torch.dtype:
    """The dtype of a weight in the target. Weights that networks always load in fp32 are not rounded."""
    wanted = target or (torch.bfloat16 if held.itemsize == 1 else held)
    part = component.kind.name
    exact = part == VAE or part == TRANSFORMER and component.family.weights.fp32(name)
    return torch.float32 if exact and wanted != held else wanted


def _plan_release(plan: ConversionPlan, folder: Path, part: str, component: Component) -> None:
    """Plans a transformer in the layout of MindSpeed-MM's converter, with one pipeline stage."""
    to_mindspeed = component.family.to_mindspeed
    if to_mindspeed is None:
        raise ValueError(f"MindSpeed-MM's layout does not support a {component.kind.what}. Use --to diffusers.")
    for name, value in component.part.hidden.items():
        if component.config.get(name, value) != value:
            raise ValueError(f"{component.shards[0]} has {name} {component.config[name]}, but MindSpeed-MM's layout "
                             f"has no config, and only supports {value}. Use --to diffusers.")  # fmt: skip
    moves = {to_mindspeed(move.name): move for move in _moves(part, component, plan.dtype)}
    plan.moves[folder / RELEASE / "mp_rank_00" / STAGE_FILE] = moves
    plan.texts[folder / TRACKER] = f"{RELEASE}\n".encode()


def _plan_component(plan: ConversionPlan, folder: Path, part: str, component: Component) -> None:
    """Plans a component with the file names and tensor names of diffusers or transformers."""
    moves = {move.name: move for move in _moves(part, component, plan.dtype)}
    standard = STANDARD_NAMES[part.startswith(TEXT_ENCODER)]
    try:
        split = split_torch_state_dict_into_shards(
            {name: move.made for name, move in moves.items()},
            filename_pattern=standard.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=plan.shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--shard-size {plan.shard_size}: {error} Give a number and a unit, such as 5GB.") from None
    for file, names in split.filename_to_tensors.items():
        plan.moves[folder / file] = {name: moves[name] for name in names}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        plan.texts[folder / f"{standard}.index.json"] = _json(index)
    key, value = component.part.class_name
    own = {name: entry for name, entry in component.config.items() if name not in ("dtype", "torch_dtype")}
    plan.texts[folder / CONFIG] = _json({key: value, **own})
    if component.folder:  # other JSON files, such as the latent preview factors next to a VAE
        found = own_files(component.folder, plan.root, "*.json", deepest=0)
        plan.copies |= {folder / name: file for name, file in found.items()
                        if name.name != CONFIG and not name.name.endswith(".index.json")}  # fmt: skip


def _plan_tokenizer(plan: ConversionPlan, parts: dict[str, Component]) -> None:
    """Plans the tokenizers next to the text encoders, where transformers finds them."""
    for part, component in parts.items():
        if part.startswith(TEXT_ENCODER):
            _plan_one_tokenizer(plan, component, Path(part.replace(TEXT_ENCODER, "tokenizer")))


def _plan_one_tokenizer(plan: ConversionPlan, component: Component, to: Path) -> None:
    found = component.tokenizer
    if found is None or not found.exists():
        plan.omitted.append(f"{to}: there is none in the text encoder's file or next to it")
    elif found.is_dir():
        component.family.text().check_folder(component.kind.name, found)
        plan.copy(found, to)
    else:
        tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
        plan.texts[to / SPIECE] = tokenizer_model(found)
        plan.texts[to / "tokenizer_config.json"] = _json({"tokenizer_class": "T5TokenizerFast", **tokens})


def _plan_own_files(plan: ConversionPlan, parts: dict[str, Component]) -> None:
    """Plans to copy the pack's own files next to a transformer: default settings and calibration."""
    around = plan.root if plan.root.is_dir() else plan.root.parent
    for name in (DEFAULTS, CALIBRATION):
        file = file_of(plan.root, name)
        if "transformer" in parts and file.is_file():
            plan.copies[Path(name)] = own_file(file, around)


def _plan_pipeline(plan: ConversionPlan, parts: dict[str, Component]) -> None:
    """Plans the other files of a diffusers pipeline: copied from the source, or created if it is not a pipeline."""
    source = plan.root
    if (source / INDEX).is_file():
        plan.copies[Path(INDEX)] = own_file(source / INDEX, source)
        for name in read_json(source / INDEX):
            if not name.isidentifier():  # diffusers passes parts as keyword arguments
                raise coded_error(
                    "AV-1309", f"{source / INDEX} names {shown(repr(name))}, which is not a valid name of a part."
                )
            if name not in parts and (source / name).is_dir():
                plan.copy(source / name, Path(name))
        return
    first = next(iter(parts.values()))
    pipeline = first.family.pipeline({name: component.config for name, component in parts.items()})
    if pipeline.scheduler is not None:
        plan.texts[SCHEDULER_CONFIG] = _json(dict(pipeline.scheduler))
    made = {*parts, *(path.parts[0] for path in (*plan.copies, *plan.texts))}
    classes = {name: entry if entry and name in made else ABSENT for name, entry in pipeline.classes.items()}
    plan.omitted += pipeline.left_out
    plan.texts[Path(INDEX)] = _json({"_class_name": pipeline.class_name, **pipeline.settings, **classes})


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def convert(
    plan: ConversionPlan, target: Path, identity: dict[str, object], progress: ProgressDisplay | None = None
) -> None:
    """Writes the folder `target`, or continues an interrupted conversion.

    identity: facts that must be equal to continue a conversion. Raises ValueError if the folder cannot be written, or
    the target's dtype cannot hold a weight.
    """
    _check_apart(plan, target)
    progress = progress or ProgressDisplay()
    with unfinished(target, identity) as work:
        if work.is_finished:
            work.clear()
            return
        held = plan.source()
        _check_space(plan, work.made)
        progress.begin("creating files")
        steps = laid_out(plan.moves, work)
        before = sum(step.nbytes for step in steps[: work.done])
        progress.begin("weights", total=plan.nbytes, done=before, unit="B")
        fill(steps, work, progress.advance)
        if plan.source() != held:
            raise coded_error(
                "AV-1315", "SOURCE changed while it was read. Delete the partial result, and start again."
            )
        for path in sorted((*plan.copies, *plan.texts), key=lambda path: path.name == INDEX):  # the index last
            made = work.place(path)
            if path in plan.copies:
                shutil.copyfile(plan.copies[path], made)
            else:
                made.write_bytes(plan.texts[path])
            sync(made)
        work.finish()


def _check_apart(plan: ConversionPlan, target: Path) -> None:
    """Raises ValueError if the target is inside a folder that is read completely."""
    whole = [*plan.folders, *(shard for one in plan.sources for shard in one.shards if shard.is_dir())]
    for folder in whole:
        if resolved(target).is_relative_to(resolved(folder)):
            raise ValueError(f"{target} is in {folder}, which is read completely. Give a target outside of it.")


def _check_space(plan: ConversionPlan, made: Path) -> None:
    there = sum(file.stat().st_blocks * 512 for file in made.rglob("*") if file.is_file())
    needed = plan.nbytes + sum(file.stat().st_size for file in plan.copies.values()) - there
    free = shutil.disk_usage(made.parent).free
    if needed > free:
        raise coded_error(
            "AV-1316",
            f"{made.parent} needs {math.ceil(needed / 1e7) / 100:.2f} GB more, but "
            f"{math.floor(free / 1e7) / 100:.2f} GB are free. Free some space, or give a target on another disk.",
        )
