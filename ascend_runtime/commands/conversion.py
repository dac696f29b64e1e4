"""`python -m ascend_runtime convert SOURCE TARGET --to FORMAT`: a model in diffusers' or MindSpeed-MM's layout."""

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
from ..checkpoints.formats.tensor_files import open_tensors
from ..checkpoints.paths import CALIBRATION, DEFAULTS, file_of
from ..checkpoints.states import states
from ..checkpoints.tokenizers import SPIECE, check_class, tokenizer_model
from ..checkpoints.writing.links import own_file, own_files, resolved
from ..checkpoints.writing.transfer import Move, fill, laid_out
from ..checkpoints.writing.unfinished import partial_folder, sync, unfinished
from ..checkpoints.writing.writers import WRITE_BYTES
from ..components.networks import empty_network
from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE
from ..recognition.component import Component
from ..recognition.folders import STANDARD_NAMES, TRANSFORMER_FOLDERS, has_folder
from ..recognition.mindspeed import RELEASE, STAGE_FILE, TRACKER
from ..specs.models import WEIGHT_DTYPES
from .inspection import inspect
from .progress import Progress

DTYPES = dict(zip(WEIGHT_DTYPES, (None, torch.bfloat16, torch.float16, torch.float32)))
INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER = Path("scheduler", "scheduler_config.json")
NOTHING = (None, None)  # in the place of what it has not


@dataclass
class Plan:
    """What a target will hold, by paths within it. root: of what it is made, a folder or a file."""

    root: Path
    moves: dict[Path, dict[str, Move]] = field(default_factory=dict)  # of each file of weights, by the names there
    texts: dict[Path, bytes] = field(default_factory=dict)
    copies: dict[Path, Path] = field(default_factory=dict)  # of files as they are
    folders: list[Path] = field(default_factory=list)  # of which all files are copied
    left_out: list[str] = field(default_factory=list)  # why, in words
    sources: list[Component] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(move.made.nbytes for moves in self.moves.values() for move in moves.values())

    def copy(self, folder: Path, to: Path) -> None:
        """All of a folder of the source, or next to it. Raises ValueError where a link in it leads elsewhere (see
        checkpoints/links.py)."""
        self.folders.append(folder)
        around = self.root if folder.is_relative_to(self.root) else self.root.parent
        self.copies |= {to / name: file for name, file in own_files(folder, around).items()}

    def source(self) -> list[tuple]:
        """Changes when a file that is read does."""
        return [*(state for one in self.sources for state in one.fingerprint), *states(self.copies.values())]

    def digest(self) -> str:
        """Changes when something else is made of the same source, or in other steps."""
        moves = [(str(path), name, move.key, str(move.made.dtype)) for path, moves in self.moves.items()
                 for name, move in moves.items()]  # fmt: skip
        made = repr((WRITE_BYTES, moves, sorted(self.texts.items()), sorted(self.copies)))
        return hashlib.sha256(made.encode()).hexdigest()


def run(arguments: argparse.Namespace, progress: Progress | None = None) -> int:
    """Converts, and says what was made. Returns the exit status: 0 made, 1 refused, 130 interrupted."""
    progress = progress or Progress()
    source, target = (Path(path).expanduser().absolute() for path in (arguments.source, arguments.target))
    try:
        plan = planned(source, arguments.to, DTYPES[arguments.dtype], arguments.shard_size, progress.begin)
        _say(plan, progress)
        identity = {
            "SOURCE": str(source), "--to": arguments.to, "--dtype": arguments.dtype,
            "--shard-size": arguments.shard_size, "what SOURCE holds": plan.source(),
            "what this version of the pack makes of it": [plan.digest()],
        }  # fmt: skip
        convert(plan, target, identity, progress)
    except ValueError as error:
        progress.refuse(error)
        return 1
    except OSError as error:  # such as a disk that others filled meanwhile
        progress.refuse(OSError(f"{error}. Fix that, or name another target; {_kept(target)}"))
        return 1
    except KeyboardInterrupt:
        progress.end()
        print(f"interrupted; {_kept(target)}", file=sys.stderr)
        return 130
    progress.end()
    files = [*plan.moves, *plan.texts, *plan.copies]
    print(f"{printable(str(target))}: {len(files)} files, {plan.nbytes / 1e9:.2f} GB of weights")
    return 0


def _say(plan: Plan, progress: Progress) -> None:
    """What is about to be written, and what is not."""
    progress.end()
    for why in plan.left_out:
        print(f"left out: {printable(why)}", flush=True)
    files = len(plan.moves) + len(plan.texts) + len(plan.copies)
    progress.say(f"{files} files to write, {plan.nbytes / 1e9:.2f} GB of weights")


def _kept(target: Path) -> str:
    if os.path.isdir(partial_folder(target)):
        return "what was written is kept, and the same command goes on from here"
    return "nothing was written"


def planned(
    source: Path,
    to: str,
    dtype: torch.dtype | None,
    shard_size: str,
    on_part: Callable[[str], None] = lambda part: None,
) -> Plan:
    """What is to be written. No weight is read.

    dtype: of the weights; None: each one's own, bfloat16 for 8 bits. on_part: called before each part is looked at.
    Raises ValueError where a part of the source is not whole, or none of it can be kept so.
    """
    plan = Plan(source)
    parts = _parts(source, to, plan.left_out, on_part)
    plan.sources += parts.values()
    if to == "mindspeed":
        for part, component in parts.items():
            _plan_release(plan, Path(TRANSFORMER_FOLDERS[part][1] if len(parts) > 1 else ""), part, component, dtype)
        _plan_own_files(plan, parts)
        return plan
    _plan_tokenizer(plan, parts)
    single = len(parts) == 1 and not (plan.copies or plan.texts)
    for part, component in parts.items():
        _plan_component(plan, Path("" if single else part), part, component, dtype, shard_size)
    if not single:
        _plan_pipeline(plan, parts)
    _plan_own_files(plan, parts)
    return plan


def _parts(source: Path, to: str, left_out: list[str], on_part: Callable[[str], None]) -> dict[str, Component]:
    """What is there; why something is not taken goes to `left_out`."""
    parts, faults = {}, []
    for found in inspect(str(source), on_part):
        if found.component is None and found.fault is None:
            continue
        if to == "mindspeed" and found.part not in TRANSFORMER_FOLDERS:
            if found.component:
                left_out.append(f"{found.part}: MindSpeed-MM's layout has only transformers; take --to diffusers")
        elif found.component:  # `_moves` finds out whether its weights fit; what is to lie beside them may lack
            parts[found.part] = found.component
        elif found.part == "transformer_2" or has_folder(source, found.part):
            faults.append(f"{found.part}: {found.fault}")
        else:
            left_out.append(f"{found.part}: {found.fault}")
    if faults or not parts:
        raise ValueError("\n".join(faults or left_out))
    return parts


def _moves(part: str, component: Component, dtype: torch.dtype | None) -> list[Move]:
    """In the order of the network. Raises ValueError where weights are missing, do not fit, or lie there quantized."""
    if component.quantized is not None:
        raise ValueError(
            f"{component.quantized.file} says that the {part} is quantized; other formats have no place for that. "
            "Convert the model's bf16 or fp16 form."
        )
    network = empty_network(component)
    places = component.places_in(network)
    held = {}
    for shard in component.shards:
        with open_tensors(shard) as file:
            held |= {name: file.dtype(place.key) for name, place in places.items() if place.shard == shard}
    names = [name for name in network.state_dict() if name in places]
    return [
        Move(name, place.shard, place.key, place.scale,
             torch.empty(place.shape, dtype=_dtype(component, name, held[name], dtype), device="meta"), place.rows)
        for name, place in ((name, places[name]) for name in names)
    ]  # fmt: skip


def _dtype(component: Component, name: str, held: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """That of a weight in the target. What is loaded in fp32, whatever the dtype of the blocks, loses nothing."""
    wanted = asked or (torch.bfloat16 if held.itemsize == 1 else held)
    part = component.kind.name
    exact = part == VAE or part == TRANSFORMER and component.family.weights.fp32(name)
    return torch.float32 if exact and wanted != held else wanted


def _plan_release(plan: Plan, folder: Path, part: str, component: Component, dtype: torch.dtype | None) -> None:
    """A transformer as MindSpeed-MM's converter leaves it, in one pipeline stage."""
    for name, value in component.part.hidden.items():
        if component.config.get(name, value) != value:
            raise ValueError(f"{component.shards[0]} has {name} {component.config[name]}. MindSpeed-MM's layout has no "
                             f"config, and is read with {value}. Convert it with --to diffusers.")  # fmt: skip
    to_mindspeed = component.family.to_mindspeed
    if to_mindspeed is None:
        raise ValueError(f"MindSpeed-MM has no {component.kind.what}. Convert it with --to diffusers.")
    moves = {to_mindspeed(move.name): move for move in _moves(part, component, dtype)}
    plan.moves[folder / RELEASE / "mp_rank_00" / STAGE_FILE] = moves
    plan.texts[folder / TRACKER] = f"{RELEASE}\n".encode()


def _plan_component(
    plan: Plan, folder: Path, part: str, component: Component, dtype: torch.dtype | None, shard_size: str
) -> None:
    """A component as diffusers or transformers save it: their names of files, and of what is in them."""
    moves = {move.name: move for move in _moves(part, component, dtype)}
    standard = STANDARD_NAMES[part.startswith(TEXT_ENCODER)]
    try:
        split = split_torch_state_dict_into_shards(
            {name: move.made for name, move in moves.items()},
            filename_pattern=standard.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--shard-size {shard_size}: {error} Give a number and a unit, such as 5GB.") from None
    for file, names in split.filename_to_tensors.items():
        plan.moves[folder / file] = {name: moves[name] for name in names}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        plan.texts[folder / f"{standard}.index.json"] = _json(index)
    key, value = component.part.class_name
    own = {name: entry for name, entry in component.config.items() if name not in ("dtype", "torch_dtype")}
    plan.texts[folder / CONFIG] = _json({key: value, **own})
    if component.folder:  # such as the latents' colours beside a VAE
        found = own_files(component.folder, plan.root, "*.json", deepest=0)
        plan.copies |= {folder / name: file for name, file in found.items()
                        if name.name != CONFIG and not name.name.endswith(".index.json")}  # fmt: skip


def _plan_tokenizer(plan: Plan, parts: dict[str, Component]) -> None:
    """Next to a text encoder, where transformers finds it."""
    for part, component in parts.items():
        if part.startswith(TEXT_ENCODER):
            _plan_one_tokenizer(plan, component.tokenizer, Path(part.replace(TEXT_ENCODER, "tokenizer")))


def _plan_one_tokenizer(plan: Plan, found: Path | None, to: Path) -> None:
    if found is None or not found.exists():
        plan.left_out.append("tokenizer: there is none in the text encoder's file, nor next to it")
    elif found.is_dir():
        check_class(found)
        plan.copy(found, to)
    else:
        tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
        plan.texts[to / SPIECE] = tokenizer_model(found)
        plan.texts[to / "tokenizer_config.json"] = _json({"tokenizer_class": "T5TokenizerFast", **tokens})


def _plan_own_files(plan: Plan, parts: dict[str, Component]) -> None:
    """What the pack itself keeps next to a transformer: what it is run with, and what a calibration found."""
    around = plan.root if plan.root.is_dir() else plan.root.parent
    for name in (DEFAULTS, CALIBRATION):
        file = file_of(plan.root, name)
        if "transformer" in parts and file.is_file():
            plan.copies[Path(name)] = own_file(file, around)


def _plan_pipeline(plan: Plan, parts: dict[str, Component]) -> None:
    """What diffusers' pipeline has beside its networks: as it is in the source, or made where that is no pipeline."""
    source = plan.root
    if (source / INDEX).is_file():
        plan.copies[Path(INDEX)] = own_file(source / INDEX, source)
        for name in read_json(source / INDEX):
            if not name.isidentifier():  # diffusers passes what is there by these names
                raise ValueError(f"{source / INDEX} names {shown(repr(name))}, which no part of a pipeline is called.")
            if name not in parts and (source / name).is_dir():
                plan.copy(source / name, Path(name))
        return
    first = next(iter(parts.values()))
    pipeline = first.family.pipeline({name: component.config for name, component in parts.items()})
    if pipeline.scheduler is not None:
        plan.texts[SCHEDULER] = _json(dict(pipeline.scheduler))
    made = {*parts, *(path.parts[0] for path in (*plan.copies, *plan.texts))}
    classes = {name: entry if entry and name in made else NOTHING for name, entry in pipeline.classes.items()}
    plan.left_out += pipeline.left_out
    plan.texts[Path(INDEX)] = _json({"_class_name": pipeline.class_name, **pipeline.settings, **classes})


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def convert(plan: Plan, target: Path, identity: dict[str, object], progress: Progress | None = None) -> None:
    """Makes the folder `target`, or goes on making it where that was stopped.

    identity: what a conversion must have in common with the one that it goes on with. Raises ValueError where it cannot
    be made, or a weight cannot be kept.
    """
    _check_apart(plan, target)
    progress = progress or Progress()
    with unfinished(target, identity) as work:
        if work.is_finished:
            work.clear()
            return
        held = plan.source()
        _check_space(plan, work.made)
        progress.begin("laying files out")
        steps = laid_out(plan.moves, work)
        before = sum(step.nbytes for step in steps[: work.done])
        progress.begin("weights", total=plan.nbytes, done=before, unit="B")
        fill(steps, work, progress.advance)
        if plan.source() != held:
            raise ValueError("SOURCE changed while it was read. Delete what was made of it, and start over.")
        for path in sorted((*plan.copies, *plan.texts), key=lambda path: path.name == INDEX):  # a model has it: last
            made = work.place(path)
            if path in plan.copies:
                shutil.copyfile(plan.copies[path], made)
            else:
                made.write_bytes(plan.texts[path])
            sync(made)
        work.finish()


def _check_apart(plan: Plan, target: Path) -> None:
    """What is made must not be among what is read."""
    whole = [*plan.folders, *(shard for one in plan.sources for shard in one.shards if shard.is_dir())]
    for folder in whole:
        if resolved(target).is_relative_to(resolved(folder)):
            raise ValueError(f"{target} lies in {folder}, of which all is read. Name a target outside of it.")


def _check_space(plan: Plan, made: Path) -> None:
    there = sum(file.stat().st_blocks * 512 for file in made.rglob("*") if file.is_file())
    needed = plan.nbytes + sum(file.stat().st_size for file in plan.copies.values()) - there
    free = shutil.disk_usage(made.parent).free
    if needed > free:
        raise ValueError(
            f"{made.parent} needs {math.ceil(needed / 1e7) / 100:.2f} GB more, and "
            f"{math.floor(free / 1e7) / 100:.2f} GB are free there. Make room, or name a target on another disk."
        )
