"""Predicts the peak memory of a computation by running it on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def most_allocated(compute: Callable[[], None]) -> int:
    """The peak number of bytes of the tensors that `compute` creates. On the meta device nothing is computed. Does not
    include what kernels allocate internally."""
    with torch.no_grad(), _Allocated() as allocated:
        compute()
    return allocated.most


class _Allocated(TorchDispatchMode):
    """Tracks the storages that operations create and free."""

    def __init__(self):
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        made = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._allocate(tensor.untyped_storage())
        return made

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
