"""Accelerators: caches against their ideal, sparse attention against its bound, 8 bits against floating point, and
presets on the embedded model."""

from __future__ import annotations

from typing import Iterator

from . import caches, presets, quantization, rainfusion
from .report import Row

PARTS = (caches, rainfusion, quantization, presets)


def run(quick: bool) -> Iterator[Row]:
    for part in PARTS:
        yield from part.rows(quick)
