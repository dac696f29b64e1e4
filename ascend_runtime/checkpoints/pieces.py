"""Reads tensors of an open file with several threads, piece by piece, so that memory use does not depend on their size.

A piece is some rows of a tensor. It is read, checked and converted to the dtype in which it is kept.
"""

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

from ..errors import coded_error
from ..ops.packing import Packing
from ..ops.finite import is_finite
from ..ops.quantization import quantized_rows
from .codings.coding import Coding, numbers_in
from .codings.fp8 import is_8_bits
from .formats.parts import Rows, Slices, by_rows, full_slices, in_columns, in_ranges, with_ones
from .formats.tensor_file import TensorFile
from .msmodelslim import as_numbers

THREADS, MAX_THREADS = 4, 16  # a rank reads with as many threads as it computes with, within these bounds
READ_BYTES = 4 * 2**20  # of a piece on disk
PIECES_PER_THREAD = 2  # pieces that are being read, or not consumed yet


@dataclass(frozen=True)
class Wanted:
    """A part of a tensor to read: how it is stored in a file, and how it is kept.

    name: used in errors. key: its name in the file. coding: how its numbers are stored; None: as torch stores them.
    shape: of the whole tensor. part: None for all of it. dtype, device: where it is kept. scales: the name of the new
    row scales, if it is to be quantized to int8; a scale belongs to a whole row, even if `part` cuts the rows. rows:
    its ranges of the stored tensor's rows, concatenated in this order; columns: its range of that tensor's columns;
    None: all. packing: how its values are kept as bytes, to which `shape` and `part` refer then; None: as numbers.
    """

    name: str
    key: str
    coding: Coding | None
    shape: tuple[int, ...]
    part: Slices | None
    dtype: torch.dtype
    device: torch.device
    scales: str | None = None
    rows: Rows | None = None
    columns: slice | None = None
    packing: Packing | None = None

    def lies(self, part: Slices, dims: int) -> Slices:
        """The slices of the stored tensor, which has so many dims, given those of the rows that it keeps."""
        return with_ones(in_columns(part if self.packing is None else self.packing.stored(part), self.columns), dims)


@dataclass(frozen=True)
class _Piece:
    """part: of the tensor on disk; None: it is mapped, and nothing is read. made: the tensors that are filled, by name.
    rows: views of the piece's rows in them. last: whether this is the tensor's last piece."""

    of: Wanted
    part: Slices | None
    rows: list[Tensor]
    made: dict[str, Tensor]
    last: bool


def read_in_pieces(file: TensorFile, wanted: Iterable[Wanted]) -> Iterator[tuple[str, Tensor]]:
    """Yields each name and tensor, in the order of `wanted`. Close the generator before the file.

    Raises ValueError for the first tensor, in this order, that cannot be read, or has values that are not finite or
    exceed its dtype.
    """
    threads = min(max(THREADS, torch.get_num_threads()), MAX_THREADS)
    under_way: deque[tuple[_Piece, Future]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        try:
            for piece in chain.from_iterable(_pieces(file, one) for one in wanted):
                if len(under_way) == PIECES_PER_THREAD * threads:
                    yield from _taken(*under_way.popleft())
                under_way.append((piece, pool.submit(_make, file, piece)))
            while under_way:
                yield from _taken(*under_way.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each():
    """Makes threads that start inside compute with one thread each, as there are many of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # set here, not in the threads: the number applies to all new threads, and to libraries
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pieces(file: TensorFile, wanted: Wanted) -> Iterator[_Piece]:
    held = file.dtype(wanted.key)
    part = wanted.part or full_slices(wanted.shape)
    mapped = wanted.part is None and wanted.device.type == "cpu"
    mapped = mapped and kept_as_stored(wanted.dtype, held, wanted.coding, wanted.rows, wanted.packing)
    shape = [own.stop - own.start for own in part]
    made = {wanted.name: _mapped(file, wanted) if mapped else _empty(shape, wanted.dtype, wanted.device)}
    if wanted.scales:
        made[wanted.scales] = _empty([shape[0], 1], torch.float32, wanted.device)
        part = (part[0], *full_slices(wanted.shape)[1:])
    cuts = in_ranges(part, wanted.rows)
    nbytes = wanted.coding.bits / 8 if wanted.coding else held.itemsize
    if mapped or file.in_rows(wanted.key):
        cuts = [cut for both in cuts for cut in zip(*(by_rows(one, nbytes, READ_BYTES) for one in both))]
    dims = len(file.shapes[wanted.key])
    for cut in cuts:
        own, lies = cut
        rows = slice(own[0].start - part[0].start, own[0].stop - part[0].start) if own else ...
        lies = None if mapped else wanted.lies(lies, dims)
        yield _Piece(wanted, lies, [x[rows] for x in made.values()], made, last=cut is cuts[-1])


def kept_as_stored(
    dtype: torch.dtype, held: torch.dtype, coding: Coding | None, rows: Rows | None, packing: Packing | None
) -> bool:
    """Whether a tensor that is kept in this dtype lies in its file just so. If all of it is kept on a CPU, it is a view
    of the mapped file, so that ranks share its memory.

    held: its dtype in the file. coding, rows, packing: see `Wanted`.
    """
    return held == dtype and coding is packing is None and (rows is None or len(rows) == 1)


def _mapped(file: TensorFile, wanted: Wanted) -> Tensor:
    ((_, lies),) = in_ranges(full_slices(wanted.shape), wanted.rows)
    if wanted.rows is wanted.columns is None:
        return file.mapped(wanted.key).view(wanted.shape)
    return file.mapped(wanted.key, wanted.lies(lies, len(file.shapes[wanted.key])))


def _empty(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _make(file: TensorFile, piece: _Piece) -> list[Tensor]:
    """Reads the piece on the CPU; fills its rows if the tensor is kept on the CPU."""
    of = piece.of
    if piece.part is None:
        return [_checked(piece.rows[0], of.dtype, of.name, file.path)]
    if of.scales:
        return _quantized(file, piece)
    if of.packing:
        return [_packed(file, piece)]
    into = piece.rows[0] if of.device.type == "cpu" else None
    return [read_as(file, of.key, piece.part, of.dtype, coding=of.coding, name=of.name, into=into)]


def _quantized(file: TensorFile, piece: _Piece) -> list[Tensor]:
    """[int8 values, row scales]"""
    of = piece.of
    weight = read_as(file, of.key, piece.part, torch.float32, coding=of.coding, name=of.name)
    made, scales = quantized_rows(weight)
    made = made if of.part is None else made[:, of.part[1]]
    if of.device.type != "cpu":
        return [made, scales]
    return [into.copy_(x) for into, x in zip(piece.rows, (made, scales))]


def _packed(file: TensorFile, piece: _Piece) -> Tensor:
    of = piece.of
    try:
        made = of.packing.packed(file.read(of.key, piece.part))
    except ValueError as error:
        raise coded_error("AV-1408", f"{file.path} has {error} in {of.name}. Quantize the model again.") from None
    return piece.rows[0].copy_(made) if of.device.type == "cpu" else made


def _taken(piece: _Piece, made: Future) -> Iterator[tuple[str, Tensor]]:
    """Waits for a piece, and yields the tensors with their names after the last one."""
    rows = made.result()
    if piece.of.device.type != "cpu":  # in this thread, which owns the device's context
        for into, x in zip(piece.rows, rows):
            into.copy_(x.view_as(into))
    if piece.last:
        yield from piece.made.items()


def read_as(
    file: TensorFile,
    key: str,
    part: Slices,
    dtype: torch.dtype,
    *,
    coding: Coding | None,
    name: str,
    into: Tensor | None = None,
) -> Tensor:
    """A part of a tensor of a file, converted to `dtype`.

    coding: how its numbers are stored; None: as torch stores them. name: used in errors. into: a contiguous tensor of
    the part's shape and this dtype to read into; None: allocates one.
    Raises ValueError for values that are not finite, or exceed the dtype.
    """
    straight = into if coding is None and dtype == file.dtype(key) else None
    tensor = numbers_in(coding, file, key, part) if coding else as_numbers(file.read(key, part, straight))
    tensor = _checked(tensor.float() if is_8_bits(tensor.dtype) else tensor, dtype, name, file.path)
    if into is None:
        return tensor.to(dtype)
    return tensor if straight is not None else into.copy_(tensor.view_as(into))


def _checked(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """`tensor`. Raises ValueError, which names it and the file, for values that are not finite in `dtype`."""
    if is_finite(tensor, dtype):
        return tensor
    if not is_finite(tensor):
        raise coded_error(
            "AV-1317", f"{path} has NaN or infinite values in {name}. The file is damaged: download it again."
        )
    raise coded_error(
        "AV-1412",
        f"{path} has values of up to {tensor.abs().max():.3g} in {name}, which exceed {dtype}. Use a dtype with a "
        "larger range: bfloat16 or float32.",
    )
