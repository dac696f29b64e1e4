"""Copies tensors from files to files, a piece at a time, and skips pieces that are already on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from ..formats.parts import Slices, full_slices, in_ranges, with_ones
from ..formats.tensor_file import TensorFile
from ..opening import open_tensors
from ..pieces import read_as
from ..reader import Place
from .unfinished import Unfinished, sync
from .writers import lay_out, pieces, starts, write_at

SYNC = 2**28  # bytes that are written between two syncs to disk


@dataclass(frozen=True)
class Move:
    """A tensor to copy. name: diffusers' or transformers' name. places: where it lies; several are concatenated along
    its columns (dim 1). made: the result, on the meta device."""

    name: str
    places: tuple[Place, ...]
    made: torch.Tensor


@dataclass(frozen=True)
class PieceCopy:
    """The copy of a piece of a tensor to `offset` in a file."""

    file: Path
    move: Move
    part: Slices
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(own.stop - own.start for own in self.part) * self.move.made.itemsize


def laid_out(moves: dict[Path, dict[str, Move]], work: Unfinished) -> list[PieceCopy]:
    """All copies that fill these files, in file order. Lays the files out first, unless they already are.

    moves: the tensors of each file, by its path in the new folder and by their names in it.
    """
    if work.done is None:
        for path, own in moves.items():
            place = work.place(path)
            lay_out(place, {name: move.made for name, move in own.items()})
            sync(place)
        work.record(0)
    return [step for path, own in moves.items() for step in _steps(work.place(path), own)]


def _steps(file: Path, moves: dict[str, Move]) -> Iterator[PieceCopy]:
    for name, start in starts(file).items():
        for part, offset in pieces(moves[name].made):
            yield PieceCopy(file, moves[name], part, start + offset)


def fill(steps: Sequence[PieceCopy], work: Unfinished, on_bytes: Callable[[int], object]) -> None:
    """Performs the copies that are not recorded yet. on_bytes: called with the bytes that each wrote.

    Raises ValueError, which names the tensor, for values that are not finite, or exceed the new dtype.
    """
    left = steps[work.done :]
    with ExitStack() as stack:
        shards = {place.shard for step in left for place in step.move.places}
        files = {shard: stack.enter_context(open_tensors(shard)) for shard in shards}
        for path, own in groupby(left, key=lambda step: step.file):
            _fill_file(path, own, files, work, on_bytes)


def _fill_file(
    path: Path, steps: Iterator[PieceCopy], files: dict[Path, TensorFile], work: Unfinished, on_bytes
) -> None:
    with path.open("r+b", buffering=0) as file:
        done, pending = work.done, 0
        for step in steps:
            write_at(file.fileno(), _made(files, step), step.offset)
            on_bytes(step.nbytes)
            done, pending = done + 1, pending + step.nbytes
            if pending >= SYNC:
                os.fdatasync(file.fileno())
                work.record(done)
                pending = 0
        os.fdatasync(file.fileno())
        work.record(done)


def _made(files: dict[Path, TensorFile], step: PieceCopy) -> torch.Tensor:
    """A piece, which has whole rows."""
    columns = [_read(files[place.shard], place, step) for place in step.move.places]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _read(file: TensorFile, place: Place, step: PieceCopy) -> torch.Tensor:
    """The piece's rows of what lies in one place."""
    part, dims = (*step.part[:1], *full_slices(place.shape)[1:]), len(file.shapes[place.key])
    made = [
        read_as(file, place.key, with_ones(lies, dims), step.move.made.dtype, coding=place.coding, name=step.move.name)
        for _, lies in in_ranges(part, place.rows, place.columns)
    ]
    return made[0] if len(made) == 1 else torch.cat(made)
