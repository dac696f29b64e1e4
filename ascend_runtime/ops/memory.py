"""Predicts the peak memory of a computation by running it on the meta device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_labels = [""]  # the last is in use


@contextmanager
def labelled(name: str) -> Iterator[None]:
    """What is allocated inside counts for this name (see `Allocated.at_peak`)."""
    _labels.append(name)
    try:
        yield
    finally:
        _labels.pop()


class Allocated(NamedTuple):
    """Bytes of tensors that a computation created. most: at its peak. at_peak: the same by label; "" for what has none.
    kept: what is still there when only the result of the computation is."""

    most: int
    at_peak: Mapping[str, int]
    kept: int


def most_allocated(compute: Callable[[], object]) -> int:
    """The peak number of bytes of the tensors that `compute` creates. On the meta device nothing is computed. Does not
    include what kernels allocate internally."""
    return allocated(lambda tracking: compute()).most


def allocated(compute: Callable[[Tracking], object], given: Iterable[Tensor] = ()) -> Allocated:
    """As `most_allocated`, in detail. given: tensors that exist before, and do not count."""
    with torch.no_grad(), Tracking(given) as tracking:
        result = compute(tracking)
        made = Allocated(tracking.most, tracking.at_peak, tracking.now)
        del result
    return made


class Tracking(TorchDispatchMode):
    """Tracks the storages that operations create and free. now: bytes of those that exist."""

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.most = self.now = 0
        self.at_peak: Mapping[str, int] = {}
        self._by_label: Counter[str] = Counter()
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        made = operator(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._allocate(tensor.untyped_storage())
        return made

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size, label = storage._cdata, storage.nbytes(), _labels[-1]
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self._by_label[label] += size
            if self.now > self.most:
                self.most, self.at_peak = self.now, dict(self._by_label)
            weakref.finalize(storage, self._free, key, size, label)

    def _free(self, key: int, size: int, label: str) -> None:
        self._known.discard(key)
        self.now -= size
        self._by_label[label] -= size
