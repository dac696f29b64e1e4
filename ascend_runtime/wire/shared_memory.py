"""Shared memory between processes of one machine: for tensors of messages, and lent for results.

It uses anonymous memory files (memfd), which the kernel frees with the last process that holds them; those of messages
are reused (memory.py).
"""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import coded_error
from .memory import blocks
from .messages import Parcel, SharedTensor


@contextmanager
def lend(shape: tuple[int, ...], dtype: torch.dtype):
    """Allocates memory for a result and yields (tensor, shared): ranks write to `shared`, the caller keeps `tensor`.

    The pages live as long as the tensor or a view of it.
    """
    shared = SharedTensor(os.memfd_create("ascend-frames"), dtype, tuple(shape))
    try:
        yield _sized(shared), shared
    finally:
        shared.close()


def _sized(shared: SharedTensor) -> Tensor:
    try:
        os.ftruncate(shared.fd, shared.nbytes)
        return map_shared(shared)
    except (OSError, OverflowError) as error:
        raise coded_error(
            "AV-1208",
            f"A result of shape {list(shared.shape)} needs {shared.nbytes / 1e9:.0f} GB, which cannot be allocated "
            f"({error}). Make it smaller.",
        ) from None


def map_shared(shared: SharedTensor) -> Tensor:
    """Maps `shared` as a tensor; all processes that map it see each other's writes."""
    memory = mmap.mmap(shared.fd, shared.nbytes)
    return torch.frombuffer(memory, dtype=shared.dtype).view(shared.shape)


@contextmanager
def borrowed(shared: SharedTensor):
    """Maps lent memory and closes the descriptor; the mapping ends with the last view of the tensor."""
    try:
        yield map_shared(shared)
    finally:
        shared.close()


def block_of(parcel: Parcel) -> tuple[memoryview, int]:
    """Copies the parcel's tensors into a block. Returns its memory, and a descriptor of it for receivers."""
    block = blocks.of(parcel.size)
    try:
        for offset, tensor in parcel.tensors:
            _write(block.memory, offset, tensor)
    except BaseException:
        os.close(block.descriptor)
        raise
    return memoryview(block.memory), block.descriptor


def _write(memory: mmap.mmap, offset: int, tensor: Tensor) -> None:
    if tensor.numel():
        place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        place.view(tensor.shape).copy_(tensor.detach())
