"""What all open tensor files have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from .parts import Slices


class TensorFile(Protocol):
    """An open file; a context manager, which closes it on exit. `read` is thread-safe; `mapped` is not."""

    path: Path
    header: dict[str, str]  # the file's metadata
    shapes: dict[str, tuple[int, ...]]  # of the numbers of all tensors, by name
    stored_shapes: dict[str, tuple[int, ...]]  # of the tensors as they are stored, which `read` takes parts of

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk. Raises ValueError for a dtype that torch lacks."""

    def read(self, name: str, part: Slices | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """A part of a tensor (None: all), in its dtype on disk. Reads no other tensor.

        into: a contiguous tensor of the part's shape and dtype to read into; None: allocates one.
        """

    def in_rows(self, name: str) -> bool:
        """Whether rows of a tensor can be read without the others."""

    def mapped(self, name: str, part: Slices | None = None) -> torch.Tensor:
        """A part of a tensor (None: all), as a view of the mapped file if the tensor is contiguous, else like
        `read`."""
