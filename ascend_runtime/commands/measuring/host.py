"""How fast the host reads files and multiplies matrices, outside of ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
MOST_READ = 2**28  # bytes at most
LEAST = 2**22  # bytes: a smaller file shows latency only
PIECE = 2**24
TOKENS, WIDTH = 256, 2048


def disk_cost(path: str) -> float | None:
    """Seconds for a byte of the largest weight file at `path`, read past the page cache where the system lets it be
    dropped; None: there is no file large enough."""
    root = Path(path)
    files = [root] if root.is_file() else [one for one in root.rglob("*") if one.suffix in SUFFIXES and one.is_file()]
    largest = max(files, key=lambda one: one.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < LEAST:
        return None
    with largest.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, done = time.perf_counter(), 0
        while done < MOST_READ and (piece := file.read(PIECE)):
            done += len(piece)
        return (time.perf_counter() - start) / done


def product_cost(dtype: str) -> float:
    """Seconds for a FLOP of a matrix product on all cores, as in a text encoder."""
    kind = getattr(torch, dtype)
    left, right = torch.ones(TOKENS, WIDTH, dtype=kind), torch.ones(WIDTH, WIDTH, dtype=kind)
    left @ right
    start = time.perf_counter()
    left @ right
    return (time.perf_counter() - start) / (2 * TOKENS * WIDTH**2)
