"""Recognises the network in a file, and its config, by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..checkpoints.faults import as_value_error, list_faults, shown
from ..checkpoints.fused import targets_of
from ..checkpoints.opening import open_tensors
from ..checkpoints.renaming import is_tokenizer
from ..checkpoints.shards import one_of_several
from ..checkpoints.states import content_state, files_of
from ..errors import coded_error
from ..models.family import TRANSFORMER, Part
from ..models.registry import families, family
from ..models.shapes import Shapes, count

# The prefixes of the networks in a file of a whole model, as ComfyUI saves it.
NETWORKS = re.compile(r"^(model\.diffusion_model|vae|first_stage_model|text_encoders|cond_stage_model|clip_vision)\.")
# What training code keeps next to each other in one file, in the order in which one is chosen: averaged weights, which
# their authors' own inference takes, then the network that makes videos. Others, such as a critic, are for training.
IN_TRAINING = (re.compile(r"(^|[._])ema(_model)?\."), re.compile(r"^(generator|student)\."))
TRAINED = re.compile(
    r"^((generator|student|critic|discriminator|fake_score|real_score|teacher|net|model)(_ema)?|ema)\."
)
# Prefixes in CLIP's vision models, whose patch embeddings are named like a transformer's.
IMAGE_ENCODERS = re.compile(r"(^|\.)(vision_model|vision_tower)\.")
MAX_PREFIXES = 4  # listed in an error
EXPERT = "_2"  # the suffix of a second expert's folder


@dataclass(frozen=True)
class Kind:
    """A kind of network: a part of a family."""

    family: str
    name: str

    @property
    def part(self) -> Part:
        return family(self.family).parts[self.name]

    @property
    def what(self) -> str:
        return self.part.what


def kinds(part: str | None = None) -> list[Kind]:
    """The kinds of one part in all families; None: of all parts."""
    return [Kind(one.name, name) for one in families().values() for name in one.parts if part in (None, name)]


def part_of(name: str) -> str:
    """The part in a folder of this name: transformer_2 holds a transformer too."""
    return TRANSFORMER if name == TRANSFORMER + EXPERT else name


@dataclass(frozen=True)
class Recognised:
    """A recognised network. first_blocks: the number of each shard's first block. prefix: of its tensors' names."""

    kind: Kind
    config: dict
    first_blocks: tuple[tuple[int, ...], ...]
    has_tokenizer: bool
    prefix: str


@lru_cache(maxsize=16)
def recognise(part: str, shards: tuple[Path, ...], _: tuple) -> Recognised:
    """The network, of any family, that these shards hold. Cached until a file changes, so that a job on a loaded model
    opens no file. Raises ValueError if the files do not hold a complete network of this part."""
    held = {shard: _names(shard) for shard in shards}
    kind = _kind_of(part, shards, {name: shape for names in held.values() for name, shape in names.items()})
    prefix = _prefix(kind, shards[0], [name for names in held.values() for name in names])
    shapes, first_blocks, has_tokenizer = {}, [], False
    for shard, names in held.items():
        has_tokenizer |= any(is_tokenizer(name) for name in names)
        # Pipeline stages number their blocks from 0; other shards of one network share one numbering.
        stages = shards[0].parent != shard.parent
        with as_value_error(shard, "the names of its tensors"):
            found = {own_name(kind, prefix, key): shape for key, shape in names.items()}
            held_by = {one.name: one.shape_in(shape) for name, shape in found.items() if name
                       for one in targets_of(kind.part.split, name, shape)}  # fmt: skip
            first_blocks.append(tuple(count(shapes, prefix) if stages else 0 for prefix in kind.part.blocks))
            shapes |= {renumbered(kind, name, first_blocks[-1]): shape for name, shape in held_by.items()}
    _require_whole(kind, shards, shapes)
    with as_value_error(shards[0], f"the {kind.what} in it", "AV-1401"):
        return Recognised(kind, kind.part.config(shapes), tuple(first_blocks), has_tokenizer, prefix)


def _kind_of(part: str, shards: Sequence[Path], held: Shapes) -> Kind:
    """The kind whose signature these tensors match. Raises ValueError if they match none, or several."""
    candidates = kinds(part)
    found = [kind for kind in candidates if _is_signed(kind, shards[0], held)]
    if len(found) == 1:
        return found[0]
    if found:
        what = " and ".join(f"a {kind.what}" for kind in found)
        raise coded_error("AV-1310", f"{shards[0]} holds {what}. Save the one that you want into a separate file.")
    code, hint = _unlike(candidates, shards, held)
    wanted = " and not ".join(
        f"a {kind.what} (it has neither {' nor '.join([*kind.part.signature][:2])})" for kind in candidates
    )
    raise coded_error(code, f"{shards[0]} is not {wanted}. {hint}")


def _unlike(candidates: Sequence[Kind], shards: Sequence[Path], held: Shapes) -> tuple[str, str]:
    """(a code, a sentence about files that hold none of these kinds)"""
    if hint := _hint_of_other(candidates, held):
        return "AV-1311", hint
    others = [kind for kind in kinds() if kind not in candidates and _holds(kind, shards[0], held)]
    if others:
        return "AV-1402", f"It is {' and '.join(f'a {kind.what}' for kind in others)}."
    if len(shards) == 1 and (hint := one_of_several(shards[0])):
        return "AV-1307", hint
    return "AV-1308", f"Its first tensors are {_first(held)}."


def _holds(kind: Kind, file: Path, held: Shapes) -> bool:
    """Whether a file holds at least one network of this kind."""
    try:
        return _is_signed(kind, file, held)
    except ValueError:  # several of them
        return True


def _hint_of_other(candidates: Iterable[Kind], held: Shapes) -> str:
    """A sentence about a similar, unsupported network; empty if nothing is known about the tensors."""
    return next(filter(None, (kind.part.other(held) for kind in candidates)), "")


def _require_whole(kind: Kind, shards: tuple[Path, ...], shapes: Shapes) -> None:
    signature = kind.part.signature
    missing = [name for name in signature if name not in shapes]
    hint = kind.part.other(shapes) or (missing and len(shards) == 1 and one_of_several(shards[0]))
    if missing:
        hint = hint or kind.part.incomplete(shapes) or "Download it again."
        raise coded_error("AV-1307", f"{shards[0]} lacks {', '.join(missing)} of a {kind.what}. {hint}")
    if hint:
        raise coded_error("AV-1311", f"{shards[0]} is not a plain {kind.what}. {hint}")
    misshapen = [
        f"{name} is {list(shapes[name])}, and must have {dims} dims" for name, dims in signature.items()
        if len(shapes[name]) != dims or 0 in shapes[name]
    ]  # fmt: skip
    if faults := list_faults({"of the wrong shape": misshapen}):
        raise coded_error("AV-1302", f"{shards[0]} is not a complete {kind.what}. Tensors {faults}. Download it again.")


def is_part(part: str, file: Path) -> bool:
    """Whether a file holds a network of this part, of any family. Raises ValueError as `is_kind` does."""
    return any(is_kind(kind, file) for kind in kinds(part))


def is_kind(kind: Kind, file: Path) -> bool:
    """Whether a file holds a network of this kind. Raises ValueError if it cannot be read, or holds several of them.
    The result, an error included, is cached until the file changes, whichever link leads to it."""
    cached = _cached_kinds(tuple(map(content_state, files_of((file,)))))
    if not cached:
        cached |= _kinds_in(file)
    fits, fault, first = cached[kind]
    if fault:
        raise ValueError(fault.replace(first, str(file)))
    return fits


@lru_cache(maxsize=64)
def _cached_kinds(state: tuple) -> dict[Kind, tuple[bool, str, str]]:
    """The cached results for a file in this state, by kind: (whether it is one, the error if any, its path then)."""
    return {}


def _kinds_in(file: Path) -> dict[Kind, tuple[bool, str, str]]:
    """See `_cached_kinds`."""
    try:
        held = _names(file)
    except ValueError as error:
        return dict.fromkeys(kinds(), (False, str(error), str(file)))
    found = {}
    for kind in kinds():
        try:
            found[kind] = _is_signed(kind, file, held), "", str(file)
        except ValueError as error:
            found[kind] = False, str(error), str(file)
    return found


def _is_signed(kind: Kind, file: Path, held: Iterable[str]) -> bool:
    prefix = _prefix(kind, file, held)
    names = {own_name(kind, prefix, name) for name in held}
    return any(name in names for name in [*kind.part.signature][:2])


def describe_other(file: Path) -> str:
    """A sentence about a file that holds no network of these kinds; empty if nothing is known about it."""
    return _hint_of_other(kinds(TRANSFORMER), _names(file)) or one_of_several(file)


def own_name(kind: Kind, prefix: str, key: str) -> str | None:
    """The network's name of the parameter that a tensor holds; None if it holds none: a whole model's file also
    has tensors of other networks, with other prefixes."""
    if is_tokenizer(key):
        return None
    if prefix and not key.startswith(prefix):
        return None if NETWORKS.match(key) or _in_training([prefix]) and TRAINED.match(key) else key
    return kind.part.rename(key[len(prefix) :])


def _prefix(kind: Kind, file: Path, names: Iterable[str]) -> str:
    """The prefix of a network's tensor names. Raises ValueError if the file holds several such networks."""
    found = {name.removesuffix(begin) for name in names for begin in kind.part.begins if name.endswith(begin)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    if kind.name == TRANSFORMER:
        found = {prefix for prefix in found if not IMAGE_ENCODERS.search(prefix)}
    if len(found) > 1 and (chosen := _in_training(found)):
        return chosen
    if len(found) > 1 and "" not in found:
        first = ", ".join(map(shown, sorted(found)[:MAX_PREFIXES])) + ", ..." * (len(found) > MAX_PREFIXES)
        raise coded_error(
            "AV-1310",
            f"{file} holds {len(found)} networks, each a {kind.what}: {first}. Save the one that you want into a "
            "separate file.",
        )
    return found.pop() if len(found) == 1 else ""


def _in_training(prefixes: Iterable[str]) -> str | None:
    """The prefix of the network to use of several that training code saved; None if these names do not show it."""
    fitting = ([prefix for prefix in prefixes if pattern.search(prefix)] for pattern in IN_TRAINING)
    return next((one[0] for one in fitting if len(one) == 1), None)


def _first(shapes: Shapes) -> str:
    return ", ".join(map(shown, sorted(shapes)[:4]))


def _names(shard: Path) -> Shapes:
    """The shapes of a shard's tensors, by name."""
    with open_tensors(shard) as file:
        return dict(file.shapes)


def renumbered(kind: Kind, name: str, blocks: tuple[int, ...]) -> str:
    """The name of a parameter with its block number increased. blocks: by how much, for each kind of blocks."""
    for prefix, later in zip(kind.part.blocks, blocks):
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if later and name.startswith(prefix) and number.isdecimal():
            return f"{prefix}{int(number) + later}{dot}{rest}"
    return name
