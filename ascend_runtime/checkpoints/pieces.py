"""Tensors of an open file, read by several threads at once, piece by piece: little is under way, however large they
are. A piece is some rows of a tensor: read, checked and made what it is to be kept as."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..ops.precision import is_finite
from ..ops.quantization import quantized_rows
from .formats.parts import Part, Rows, by_rows, in_ranges, whole
from .formats.tensor_files import TensorFile
from .fp8 import dequantized, scale_of
from .msmodelslim import as_numbers

THREADS, MOST_THREADS = 4, 16  # a rank reads with as many as it computes with; with some, as they wait for a disk too
PIECE = 4 * 2**20  # bytes on disk
AHEAD = 2  # pieces a thread that are under way, or made and not taken yet


@dataclass(frozen=True)
class Wanted:
    """A part of a tensor, as it lies in a file and as it is to be kept.

    name: what errors call it. shape: of the whole tensor; part: None is all of it. scale: the name of its scale where
    it was kept in 8 bits. scales: what the scales of its rows are to be called, where it is to be kept as integers of
    8 bits, of its own making; each is that of a whole row, whatever part of it is wanted. rows: the tensor's among
    those that lie in the file by its key, joined in this order; None: all.
    """

    name: str
    key: str
    scale: str | None
    shape: tuple[int, ...]
    part: Part | None
    dtype: torch.dtype
    device: torch.device
    scales: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class _Piece:
    """part: of the tensor on disk; None: it is mapped, and there is nothing to read. rows: the same of `made`, the
    tensors by name, as views. last: whether no other piece of the tensor follows."""

    of: Wanted
    part: Part | None
    rows: list[Tensor]
    made: dict[str, Tensor]
    last: bool


def read_in_pieces(file: TensorFile, wanted: Iterable[Wanted]) -> Iterator[tuple[str, Tensor]]:
    """Each name with its tensor, in the order in which they are wanted. To be closed before the file is.

    Raises ValueError for the first one, in this order, that cannot be read, or has values that are no
    numbers, or beyond its dtype.
    """
    threads = min(max(THREADS, torch.get_num_threads()), MOST_THREADS)
    under_way: deque[tuple[_Piece, Future]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        try:
            for piece in chain.from_iterable(_pieces(file, one) for one in wanted):
                if len(under_way) == AHEAD * threads:
                    yield from _taken(*under_way.popleft())
                under_way.append((piece, pool.submit(_make, file, piece)))
            while under_way:
                yield from _taken(*under_way.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each():
    """Threads that begin to compute inside do so alone, as there are many of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # not in these threads: the number is that of all which begin, and of libraries
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pieces(file: TensorFile, wanted: Wanted) -> Iterator[_Piece]:
    held = file.dtype(wanted.key)
    part = wanted.part or whole(wanted.shape)
    # What is kept as it lies on disk is a view of the mapped file: ranks share its memory.
    mapped = wanted.part is None and wanted.scale is None and wanted.device.type == "cpu" and held == wanted.dtype
    mapped = mapped and (wanted.rows is None or len(wanted.rows) == 1)
    shape = [own.stop - own.start for own in part]
    made = {wanted.name: _mapped(file, wanted) if mapped else _empty(shape, wanted.dtype, wanted.device)}
    if wanted.scales:
        made[wanted.scales] = _empty([shape[0], 1], torch.float32, wanted.device)
        part = (part[0], *whole(wanted.shape)[1:])
    cuts = in_ranges(part, wanted.rows)
    if mapped or file.in_rows(wanted.key):
        cuts = [cut for both in cuts for cut in zip(*(by_rows(one, held.itemsize, PIECE) for one in both))]
    for cut in cuts:
        own, lies = cut
        rows = slice(own[0].start - part[0].start, own[0].stop - part[0].start) if own else ...
        yield _Piece(wanted, None if mapped else lies, [x[rows] for x in made.values()], made, last=cut is cuts[-1])


def _mapped(file: TensorFile, wanted: Wanted) -> Tensor:
    ((_, lies),) = in_ranges(whole(wanted.shape), wanted.rows)
    return file.mapped(wanted.key, wanted.rows and lies)


def _empty(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _make(file: TensorFile, piece: _Piece) -> list[Tensor]:
    """The piece, on the CPU; tensors of the CPU have it then."""
    of = piece.of
    if piece.part is None:
        return [_checked(piece.rows[0], of.dtype, of.name, file.path)]
    if of.scales:
        return _quantized(file, piece)
    into = piece.rows[0] if of.device.type == "cpu" else None
    return [read_as(file, of.key, piece.part, of.dtype, scale=of.scale, name=of.name, into=into)]


def _quantized(file: TensorFile, piece: _Piece) -> list[Tensor]:
    """Integers of 8 bits, and the scales of their rows."""
    of = piece.of
    weight = read_as(file, of.key, piece.part, torch.float32, scale=of.scale, name=of.name)
    made, scales = quantized_rows(weight)
    made = made if of.part is None else made[:, of.part[1]]
    if of.device.type != "cpu":
        return [made, scales]
    return [into.copy_(x) for into, x in zip(piece.rows, (made, scales))]


def _taken(piece: _Piece, made: Future) -> Iterator[tuple[str, Tensor]]:
    """The tensors with their names, if the piece was the last."""
    rows = made.result()
    if piece.of.device.type != "cpu":  # here: a device's context is that of the thread which took the device
        for into, x in zip(piece.rows, rows):
            into.copy_(x)
    if piece.last:
        yield from piece.made.items()


def read_as(
    file: TensorFile,
    key: str,
    part: Part,
    dtype: torch.dtype,
    *,
    scale: str | None,
    name: str,
    into: Tensor | None = None,
) -> Tensor:
    """This part of a tensor of a file as it is to be kept.

    scale: the name of its scale where it was kept in 8 bits. name: what errors call it. into: where it goes, in one
    piece of memory, of its shape and this dtype; None: memory of its own.
    Raises ValueError where values are no numbers, or beyond the dtype.
    """
    straight = into if scale is None and dtype == file.dtype(key) else None
    tensor = as_numbers(file.read(key, part, straight))
    tensor = _checked(dequantized(tensor, scale and scale_of(file, scale, part)), dtype, name, file.path)
    if into is None:
        return tensor.to(dtype)
    return tensor if straight is not None else into.copy_(tensor)


def _checked(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """`tensor`. Raises ValueError, which names it and the file, where it has values that are no numbers in `dtype`."""
    if is_finite(tensor, dtype):
        return tensor
    if not is_finite(tensor):
        raise ValueError(f"{path} has NaN or infinite values in {name}. The file is damaged: download it again.")
    raise ValueError(
        f"{path} has values of up to {tensor.abs().max():.3g} in {name}, which {dtype} does not hold. Take a dtype of "
        "more range: bfloat16 or float32."
    )
