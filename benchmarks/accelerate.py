"""Accelerators: caches against their ideal, sparse attention against its bound, 8 bits against floating point, and
presets on the embedded model. For another family than Wan: caches, and sparse attention with text in its sequence."""

from __future__ import annotations

from typing import Iterator

from . import caches, presets, quantization, rainfusion
from .report import Row


def run(quick: bool, family: str = "wan") -> Iterator[Row]:
    yield from caches.rows(quick, family)
    yield from rainfusion.rows(quick, family)
    if family == "wan":
        yield from quantization.rows(quick)
        yield from presets.rows(quick)
