"""Files of weights that are laid out first and filled later, in pieces, so that no network is ever in memory.

Each has its full length from the start: what is not filled yet reads as zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..formats.parts import Part, by_rows, whole
from ..formats.safetensors_file import DTYPES
from ..formats.torch_file import stored_tensors

CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHTS = "model"  # under which training systems keep the weights in a file of torch.save
PIECE = 2**25  # bytes in the file that are on their way at once


def lay_out(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Makes a file for tensors of these shapes and dtypes, which lie on the meta device: .safetensors, or else what
    torch.save would write of {"model": tensors}."""
    (_lay_out_safetensors if path.suffix == ".safetensors" else _lay_out_torch)(path, tensors)


def _lay_out_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """See https://huggingface.co/docs/safetensors, "Format"; in the library's order, so that numbers are aligned."""
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
    """The zip's checksums stay those of no data: torch.load looks at none, as torch.save may leave them out too."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        torch.serialization.save({WEIGHTS: fakes}, path)


def starts(path: Path) -> dict[str, int]:
    """Where each tensor of a file that `lay_out` made begins, in bytes; in the order in which they lie there."""
    if path.suffix != ".safetensors":
        with path.open("rb", buffering=0) as file:
            return {name: stored.start for name, stored in stored_tensors(file, path)[WEIGHTS].items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    del entries["__metadata__"]
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}


def pieces(tensor: Tensor) -> Iterator[tuple[Part, int]]:
    """A tensor in rows of about PIECE bytes, and how many bytes each begins after the tensor does."""
    for part in by_rows(whole(tensor.shape), tensor.itemsize, PIECE):
        yield part, part[0].start * tensor[:1].nbytes if part else 0


def write(descriptor: int, tensor: Tensor, offset: int) -> None:
    """The numbers of `tensor` into an open file, from `offset` on."""
    memory = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    while memory:
        count = os.pwrite(descriptor, memory, offset)
        memory, offset = memory[count:], offset + count
