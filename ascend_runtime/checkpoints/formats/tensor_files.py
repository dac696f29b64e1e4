"""Files of tensors, told apart by what is in them: .safetensors, torch.save, torch's distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from ..bounded import check_tensors
from .dcp import METADATA, DistributedCheckpoint
from .parts import Part
from .safetensors_file import LONGEST_HEADER, SafetensorsFile
from .torch_file import TorchFile

# How files of torch.save begin, and llama.cpp's; a .safetensors with the length of its header, which has a bound.
ZIP, OLD_PICKLE, GGUF = b"PK\x03\x04", b"\x80\x02\x8a\x0a", b"GGUF"
# How files begin that were to be weights, and what they are.
PAGE = "a web page, as a download without the rights to it gives. Log in where it is published, and download it again"
OTHER_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS, in the place of the weights. Run `git lfs pull` in its folder, "
    "or download the file itself",
    b"<!doctype": PAGE, b"<html": PAGE, b"<?xml": PAGE,
}  # fmt: skip


class TensorFile(Protocol):
    """An open file; a context manager, whose exit closes it. Several threads may read at once; one maps."""

    path: Path
    header: dict[str, str]  # what the file says of itself
    shapes: dict[str, tuple[int, ...]]  # of all its tensors, by name

    def dtype(self, name: str) -> torch.dtype:
        """On disk. Raises ValueError for one that torch has not."""

    def read(self, name: str, part: Part | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """This part of a tensor (None: all), in its dtype on disk. No other tensor is read.

        into: where it goes, in one piece of memory, of its shape and dtype; None: memory of its own.
        """

    def in_rows(self, name: str) -> bool:
        """Whether some rows of a tensor can be read without the others."""

    def mapped(self, name: str, part: Part | None = None) -> torch.Tensor:
        """This part of a tensor (None: all) as a view of the mapped file where the tensor lies there in one piece, else
        as `read` gives it."""


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The opened file, or folder of a distributed checkpoint. Raises ValueError where it is none of those, or cut, or
    cannot be read, or names tensors as no model does (see bounded.py)."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_kind(path)(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}). May you read it?") from None
        check_tensors(path, file.shapes)
        yield file


def _kind(path: Path) -> type[TensorFile]:
    if path.is_dir():
        if not (path / METADATA).is_file():
            raise ValueError(f"{path} is a folder without {METADATA}: no distributed checkpoint of torch.")
        return DistributedCheckpoint
    if not path.is_file():
        why = "no regular file" if path.exists() else "not there"
        raise ValueError(f"{path} is {why}. Put the file of weights in its place.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes). Download it again.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(GGUF):
        raise ValueError(f"{path} is a GGUF file, and GGUF is not read. Take the model's fp8_scaled or fp16 file.")
    if start.startswith(OLD_PICKLE):
        raise ValueError(
            f"{path} was written by a torch before 1.6. Write it anew: "
            "torch.save(torch.load(it, weights_only=True), it)."
        )
    other = next((what for begin, what in OTHER_STARTS.items() if start.lstrip().lower().startswith(begin)), None)
    if other is not None:
        raise ValueError(f"{path} is {other}.")
    if start.startswith(ZIP):
        return TorchFile
    if int.from_bytes(start[:8], "little") > LONGEST_HEADER:
        raise ValueError(
            f"{path} is no file of weights: neither .safetensors nor of torch.save; or its beginning is damaged. Give "
            "the file that holds the weights, or the folder around it; if this is to be it, download it again."
        )
    return SafetensorsFile
