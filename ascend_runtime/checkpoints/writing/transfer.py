"""Tensors out of files and into files, a piece at a time; what is on disk is not written again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from ..formats.parts import Part, Rows, in_ranges
from ..formats.tensor_files import TensorFile, open_tensors
from ..pieces import read_as
from .unfinished import Unfinished, sync
from .writers import lay_out, pieces, starts, write

SYNC = 2**28  # bytes after which what was written is put on the disk, and counts as done


@dataclass(frozen=True)
class Move:
    """A tensor: what diffusers or transformers call it, where it lies, and, on the meta device, what becomes of it.

    rows: those that make it up, of what lies there; None: all.
    """

    name: str
    shard: Path
    key: str
    scale: str | None
    made: torch.Tensor
    rows: Rows | None = None


@dataclass(frozen=True)
class Step:
    """A piece of a tensor on its way, to `offset` in a file."""

    file: Path
    move: Move
    part: Part
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(own.stop - own.start for own in self.part) * self.move.made.itemsize


def laid_out(moves: dict[Path, dict[str, Move]], work: Unfinished) -> list[Step]:
    """All steps to the tensors of these files, by paths within what is being made and by names there; in the order in
    which they lie. The files are laid out first, unless they were."""
    if work.done is None:
        for path, own in moves.items():
            place = work.place(path)
            lay_out(place, {name: move.made for name, move in own.items()})
            sync(place)
        work.record(0)
    return [step for path, own in moves.items() for step in _steps(work.place(path), own)]


def _steps(file: Path, moves: dict[str, Move]) -> Iterator[Step]:
    for name, start in starts(file).items():
        for part, offset in pieces(moves[name].made):
            yield Step(file, moves[name], part, start + offset)


def fill(steps: Sequence[Step], work: Unfinished, on_bytes: Callable[[int], object]) -> None:
    """Takes the steps that are not recorded yet. on_bytes: told how many each wrote.

    Raises ValueError, which names the tensor, where values are no numbers, or beyond the dtype that they are to have.
    """
    left = steps[work.done :]
    with ExitStack() as stack:
        shards = {step.move.shard for step in left}
        files = {shard: stack.enter_context(open_tensors(shard)) for shard in shards}
        for path, own in groupby(left, key=lambda step: step.file):
            _fill_file(path, own, files, work, on_bytes)


def _fill_file(path: Path, steps: Iterator[Step], files: dict[Path, TensorFile], work: Unfinished, on_bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        done, pending = work.done, 0
        for step in steps:
            write(file.fileno(), _made(files[step.move.shard], step), step.offset)
            on_bytes(step.nbytes)
            done, pending = done + 1, pending + step.nbytes
            if pending >= SYNC:
                os.fdatasync(file.fileno())
                work.record(done)
                pending = 0
        os.fdatasync(file.fileno())
        work.record(done)


def _made(file: TensorFile, step: Step) -> torch.Tensor:
    move = step.move
    made = [
        read_as(file, move.key, lies, move.made.dtype, scale=move.scale, name=move.name)
        for _, lies in in_ranges(step.part, move.rows)
    ]
    return made[0] if len(made) == 1 else torch.cat(made)
