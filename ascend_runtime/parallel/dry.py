"""One rank of a plan without the others, for a dry run on the meta device: the layouts of `sequence` and `tensor` with
exchanges that allocate what a rank allocates, and send nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import PlainOperators
from ..ops.memory import labelled
from ..specs import Plan
from ..specs.plans import AXES
from .ring import Ring, _Exchange
from .sequence import SequenceLayout, ShardedSequence, WholeSequence
from .tensor import TensorParallel, WholeWeights
from .ulysses import Ulysses


class Seat(NamedTuple):
    """Stands for a process group: this rank has number `rank` of `degree`. copies: whether an all-gather fills a buffer
    of its own and copies it to its output, as Gloo's does."""

    degree: int
    rank: int
    copies: bool = False


class _Done:
    """Stands for the work of an exchange."""

    def wait(self) -> None:
        pass


class _Seated:
    """For a `Member` whose group is a Seat."""

    group: Seat

    @property
    def degree(self) -> int:
        return self.group.degree

    @property
    def rank(self) -> int:
        return self.group.rank


EXCHANGE = "exchange"  # the label of buffers, of what is sent and what is received


def _gathered(x: Tensor, seat: Seat) -> tuple[Tensor, list[Tensor]]:
    """(the output of an all-gather, buffers of the library until it is done)"""
    with labelled(EXCHANGE):
        x = x.contiguous()
        gathered = x.new_empty((seat.degree, *x.shape))
        return gathered, [torch.empty_like(gathered)] if seat.copies else []


class DryUlysses(_Seated, Ulysses):
    def _all_to_all(self, x: Tensor):
        with labelled(EXCHANGE):
            sent = x.contiguous()
            return _Done(), torch.empty_like(sent), sent


@dataclass(frozen=True)
class DryRing(_Seated, Ring):
    """buffers: of gathers that run. Attention takes longer than they do."""

    buffers: list[Tensor] = field(default_factory=list)

    def _start_gather(self, x: Tensor):
        gathered, buffers = _gathered(x, self.group)
        self.buffers.extend(buffers)
        return gathered, _Done()

    def _attend(self, *arguments) -> None:
        self.buffers.clear()
        super()._attend(*arguments)

    def _pass_on(self, tensors: list[Tensor]) -> _Exchange:
        with labelled(EXCHANGE):
            sent = [x.contiguous() for x in tensors]
            return _Exchange([], [torch.empty_like(x) for x in sent], sent)


class DrySequence(ShardedSequence):
    def _seat(self, group: Seat) -> tuple[int, int]:
        return group.degree, group.rank

    def _all_gather(self, x: Tensor) -> Tensor:
        return _gathered(x, self.group)[0]


class DryTensorParallel(_Seated, TensorParallel):
    def _add_up(self, x: Tensor) -> None:
        pass

    def _all_gather(self, x: Tensor) -> Tensor:
        return _gathered(x, self.group)[0]


def seats(plan: Plan, rank: int, copies: bool = False) -> dict[str, Seat]:
    """This rank's place along each axis of the plan. The last axis varies fastest."""
    found = {}
    for axis, degree in reversed(list(zip(AXES, plan.degrees))):
        rank, number = divmod(rank, degree)
        found[axis] = Seat(degree, number, copies)
    return found


def dry_sequence(
    own: dict[str, Seat], operators: PlainOperators, ring_exchange: str, overlap: bool
) -> SequenceLayout:
    """As `sequence.spread`. own: the rank's seats."""
    ulysses, ring = own["ulysses"], own["ring"]
    if ring.degree * ulysses.degree == 1:
        return WholeSequence(operators.attention)
    joint = Seat(ring.degree * ulysses.degree, ring.rank * ulysses.degree + ulysses.rank, ring.copies)
    return DrySequence(
        joint,
        operators.attention,
        DryUlysses(ulysses, overlap) if ulysses.degree > 1 else None,
        DryRing(ring, operators, ring_exchange) if ring.degree > 1 else None,
    )


def dry_tensor_parallel(seat: Seat) -> WholeWeights | TensorParallel:
    return WholeWeights() if seat.degree == 1 else DryTensorParallel(seat)
