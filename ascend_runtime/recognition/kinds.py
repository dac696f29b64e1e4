"""Which network a file holds, and how that is built: recognised by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..checkpoints.faults import listed, shown, usable
from ..checkpoints.formats.tensor_files import open_tensors
from ..checkpoints.renaming import is_tokenizer
from ..checkpoints.shards import one_of_several
from ..checkpoints.states import content_state
from ..models.family import TRANSFORMER, Part
from ..models.registry import families, family
from ..models.shapes import Shapes, count

# What is before the names of the other networks in a file of a whole model, as ComfyUI saves it.
NETWORKS = re.compile(r"^(model\.diffusion_model|vae|first_stage_model|text_encoders|cond_stage_model|clip_vision)\.")
MOST_PREFIXES = 4  # that an error lists
EXPERT = "_2"  # of a second expert's name, after that of the part


@dataclass(frozen=True)
class Kind:
    """A part of a family: which network a file may hold."""

    family: str
    name: str

    @property
    def part(self) -> Part:
        return family(self.family).parts[self.name]

    @property
    def what(self) -> str:
        return self.part.what


def kinds(part: str | None = None) -> list[Kind]:
    """Those of one part in all families; None: of all parts."""
    return [Kind(one.name, name) for one in families().values() for name in one.parts if part in (None, name)]


def part_of(name: str) -> str:
    """The part that the folder of a network of this name is of: a second expert is a transformer as the first."""
    return TRANSFORMER if name == TRANSFORMER + EXPERT else name


@dataclass(frozen=True)
class Described:
    kind: Kind
    config: dict
    first_blocks: tuple[tuple[int, ...], ...]  # of each shard, the number of its first block of each kind
    has_tokenizer: bool
    prefix: str  # before all its tensors' names


@lru_cache(maxsize=16)
def described(part: str, shards: tuple[Path, ...], _: tuple) -> Described:
    """What the shards of a network hold, of whichever family. Kept until a file changes, so that a job on a loaded
    model opens none. Raises ValueError where that is no network of this part, or not a whole one."""
    held = {shard: _names(shard) for shard in shards}
    kind = _kind_of(part, shards[0], [name for names in held.values() for name in names])
    prefix = _prefix(kind, shards[0], [name for names in held.values() for name in names])
    shapes, first_blocks, has_tokenizer = {}, [], False
    for shard, names in held.items():
        has_tokenizer |= any(is_tokenizer(name) for name in names)
        # Pipeline stages number their blocks from 0; the shards of one network have no block in common.
        stages = shards[0].parent != shard.parent
        with usable(shard, "the names of its tensors"):
            found = {own_name(kind, prefix, key): shape for key, shape in names.items()}
            first_blocks.append(tuple(count(shapes, prefix) if stages else 0 for prefix in kind.part.blocks))
            shapes |= {moved(kind, name, first_blocks[-1]): shape for name, shape in found.items() if name}
    _require_whole(kind, shards, shapes)
    with usable(shards[0], f"it as a {kind.what}"):
        return Described(kind, kind.part.config(shapes), tuple(first_blocks), has_tokenizer, prefix)


def _kind_of(part: str, file: Path, names: list[str]) -> Kind:
    """The kind of network that these tensors are of: by its signature, else the first, which says what is missing."""
    candidates = kinds(part)
    return next((kind for kind in candidates if _is_signed(kind, file, names)), candidates[0])


def _require_whole(kind: Kind, shards: tuple[Path, ...], shapes: Shapes) -> None:
    signature = kind.part.signature
    missing = [name for name in signature if name not in shapes]
    said = kind.part.other(shapes) or (missing and len(shards) == 1 and one_of_several(shards[0]))
    if missing[:2] == [*signature][:2]:
        wanted = " or ".join(f"a {one.what}" for one in kinds(kind.name))
        raise ValueError(
            f"{shards[0]} is not {wanted}: it has neither {' nor '.join(missing[:2])}. "
            f"{said or f'Its first tensors are {_first(shapes)}.'}"
        )
    if missing:
        raise ValueError(
            f"{shards[0]} lacks {', '.join(missing)} of a {kind.what}. {said or _what_a_part_is(kind, shapes)}"
        )
    if said:
        raise ValueError(f"{shards[0]} is not a plain {kind.what}. {said}")
    misshapen = [
        f"{name} is {list(shapes[name])}, not of {dims} dims" for name, dims in signature.items()
        if len(shapes[name]) != dims or 0 in shapes[name]
    ]  # fmt: skip
    if faults := listed({"of the wrong shape": misshapen}):
        raise ValueError(f"{shards[0]} is no whole {kind.what}. Tensors {faults}. Download it again.")


def is_part(part: str, file: Path) -> bool:
    """Whether a file holds a network of this part, of any family. Raises ValueError as `is_kind` does."""
    return any(is_kind(kind, file) for kind in kinds(part))


def is_kind(kind: Kind, file: Path) -> bool:
    """Raises ValueError where the file cannot be read, or holds several networks of this kind. A file is read once for
    each kind until it changes, by whichever links, and whatever came of it."""
    known = _known_of_kinds(content_state(file))
    if kind not in known:
        try:
            known[kind] = _fits(kind, file), "", str(file)
        except ValueError as error:
            known[kind] = False, str(error), str(file)
    fits, fault, first = known[kind]
    if fault:
        raise ValueError(fault.replace(first, str(file)))
    return fits


@lru_cache(maxsize=64)
def _known_of_kinds(state: tuple) -> dict[Kind, tuple[bool, str, str]]:
    """What is known of a file in this state, by kind: whether it is one, why this is not known, its path then."""
    return {}


def _fits(kind: Kind, file: Path) -> bool:
    return _is_signed(kind, file, _names(file))


def _is_signed(kind: Kind, file: Path, held: Iterable[str]) -> bool:
    prefix = _prefix(kind, file, held)
    names = {own_name(kind, prefix, name) for name in held}
    return any(name in names for name in [*kind.part.signature][:2])


def near_to(file: Path) -> str:
    """What a file is that holds no network of these kinds, as far as it is known; else empty."""
    names = _names(file)
    return next((said for kind in kinds(TRANSFORMER) if (said := kind.part.other(names))), "") or one_of_several(file)


def own_name(kind: Kind, prefix: str, key: str) -> str | None:
    """The name of the network's parameter that a tensor is; None where it is none of it: other networks of a whole
    model's file have another prefix."""
    if is_tokenizer(key):
        return None
    if prefix and not key.startswith(prefix):
        return None if NETWORKS.match(key) else key
    return kind.part.rename(key[len(prefix) :])


def _prefix(kind: Kind, file: Path, names: Iterable[str]) -> str:
    """What is before the names of a network's tensors. Raises ValueError where the file holds several such networks."""
    found = {name.removesuffix(begin) for name in names for begin in kind.part.begins if name.endswith(begin)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    if len(found) > 1 and "" not in found:
        first = ", ".join(map(shown, sorted(found)[:MOST_PREFIXES])) + ", ..." * (len(found) > MOST_PREFIXES)
        raise ValueError(
            f"{file} holds {len(found)} networks that are a {kind.what} each: {first}. Save the one "
            "that is wanted into a file of its own."
        )
    return found.pop() if len(found) == 1 else ""


def _what_a_part_is(kind: Kind, shapes: Shapes) -> str:
    if kind.name == TRANSFORMER and all(name.startswith(kind.part.blocks) for name in shapes):
        return (
            "It holds blocks only, as LightX2V's files of single blocks do, which are not read. Take the model's "
            "fp8_scaled, fp16 or bf16 form in one file, or in a folder with all its shards."
        )
    return "Download it again."


def _first(shapes: Shapes) -> str:
    return ", ".join(map(shown, sorted(shapes)[:4]))


def _names(shard: Path) -> Shapes:
    """The shapes of the tensors of a shard, by their names there."""
    with open_tensors(shard) as file:
        return dict(file.shapes)


def moved(kind: Kind, name: str, blocks: tuple[int, ...]) -> str:
    """The name of the same parameter so many blocks later. blocks: of each kind."""
    for prefix, later in zip(kind.part.blocks, blocks):
        number, dot, rest = name.removeprefix(prefix).partition(".")
        if later and name.startswith(prefix) and number.isdecimal():
            return f"{prefix}{int(number) + later}{dot}{rest}"
    return name
