"""Writes weight files in two steps: lays a file out, then fills it in pieces, so that no network is held in memory.

A file has its full length from the start; parts that are not filled yet read as zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..formats.parts import Slices, by_rows, full_slices
from ..formats.safetensors_file import SAFETENSORS_DTYPES
from ..formats.torch_file import stored_tensors

CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
WEIGHTS_KEY = "model"  # the key under which training systems keep the weights in a torch.save file
WRITE_BYTES = 2**25  # of a piece


def lay_out(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Creates a file for tensors of these shapes and dtypes, given on the meta device: .safetensors, or for any other
    suffix, what torch.save writes for {"model": tensors}."""
    (_lay_out_safetensors if path.suffix == ".safetensors" else _lay_out_torch)(path, tensors)


def _lay_out_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """See https://huggingface.co/docs/safetensors, "Format". In the library's order, so that numbers are aligned."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)


def _lay_out_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The zip's checksums are not updated when data is filled in: torch.load does not check them."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        torch.serialization.save({WEIGHTS_KEY: fakes}, path)


def starts(path: Path) -> dict[str, int]:
    """The offset in bytes of each tensor in a file that `lay_out` made, in file order."""
    if path.suffix != ".safetensors":
        with path.open("rb", buffering=0) as file:
            return {name: stored.start for name, stored in stored_tensors(file, path)[WEIGHTS_KEY].items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    del entries["__metadata__"]
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}


def pieces(tensor: Tensor) -> Iterator[tuple[Slices, int]]:
    """Splits a tensor by rows into pieces of about WRITE_BYTES bytes: (the piece, its offset in the tensor in
    bytes)."""
    for part in by_rows(full_slices(tensor.shape), tensor.itemsize, WRITE_BYTES):
        yield part, part[0].start * tensor[:1].nbytes if part else 0


def write_at(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Writes `tensor` to an open file at `offset`."""
    memory = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    while memory:
        count = os.pwrite(descriptor, memory, offset)
        memory, offset = memory[count:], offset + count
