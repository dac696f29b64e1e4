"""How the numbers of a weight are stored in a file, if not as torch stores them: in 8 bits with scales, for example."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..formats.parts import Slices

if TYPE_CHECKING:
    from ..formats.tensor_file import TensorFile


class Coding(Protocol):
    """How a weight's numbers are stored. Shapes and parts are those of the numbers, whatever the tensors on disk have.

    keys: the further tensors of the file that it reads, such as scales. grain: parts that it decodes begin and end at
    multiples of so many numbers of a row (the last dim). bits: of a number on disk, with its share of blocks' scales.
    """

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def grain(self) -> int: ...

    @property
    def bits(self) -> float: ...

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        """The numbers in a part of the weight `key`, in fp32. Reads no more of the file than they need. Raises
        ValueError, which names the file and the tensor, for scales that cannot be."""


class Codings(NamedTuple):
    """weights: the coding of each weight that has one, by its name in the file. others: the names of all tensors that
    are no parameters by themselves: marks, scales and the like. names: those by which tensors are renamed instead of
    their own."""

    weights: dict[str, Coding]
    others: set[str]
    names: Mapping[str, str] = MappingProxyType({})


def numbers_in(coding: Coding, file: TensorFile, key: str, part: Slices) -> Tensor:
    """The numbers in any part of a weight, in fp32."""
    if coding.grain == 1 or not part:
        return coding.numbers(file, key, part)
    *rows, last = part
    start = last.start // coding.grain * coding.grain
    stop = min(-(-last.stop // coding.grain) * coding.grain, file.shapes[key][-1])
    made = coding.numbers(file, key, (*rows, slice(start, stop)))
    return made if (start, stop) == (last.start, last.stop) else made[..., last.start - start : last.stop - start]
