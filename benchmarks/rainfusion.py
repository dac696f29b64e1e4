"""RainFusion's attention on a CPU: its time against the bound (1.3 d + 0.05) x dense attention, for density d.

8192 tokens (a grid of 8 x 32 x 32), for HunyuanVideo with a text of 256 behind them; 12 heads of 128, fp32, one thread;
includes reordering and the mask. Measures CPU seconds, which other load affects least; dense and sparse take turns.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from statistics import median
from typing import Callable, Iterator

import torch
from tqdm import tqdm

from ascend_runtime.acceleration.rainfusion import version_of
from ascend_runtime.specs import RainFusionSpec
from ascend_runtime.ops import PlainOperators

from .report import Row, context_of

GRID, QUICK_GRID = (8, 32, 32), (5, 16, 16)
HEADS, HEAD_DIM = 12, 128
SPARSITIES = (0.95, 0.8, 0.6)  # with the protected frame, an eighth of the video, densities of 0.3 to 0.55
ROUNDS, QUICK_ROUNDS = 5, 1
TEXTS = {"wan": ("", 0), "hunyuan_video": ("hunyuan_video.", 256)}  # (prefix of the figures, tokens in the sequence)


def rows(quick: bool, family: str = "wan") -> Iterator[Row]:
    grid, rounds = (QUICK_GRID, QUICK_ROUNDS) if quick else (GRID, ROUNDS)
    prefix, text = TEXTS[family]
    tokens = math.prod(grid) + text
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, HEADS, HEAD_DIM, generator=generator).unbind()
    operators = PlainOperators()
    versions = {s: version_of(RainFusionSpec(sparsity=s), grid, operators) for s in SPARSITIES}
    dense, sparse = [], {sparsity: [] for sparsity in SPARSITIES}
    with _one_thread():
        densities = {s: float(make(query, key, value, None).plan.density.mean()) for s, make in versions.items()}
        for _ in tqdm(range(rounds), desc="attention"):
            dense.append(_seconds(lambda: operators.attention(query, key, value)))
            for sparsity, make in versions.items():
                sparse[sparsity].append(_seconds(lambda: make(query, key, value, None)))
    for sparsity, density in densities.items():
        bound = (1.3 * density + 0.05) * median(dense)
        yield Row(
            name=f"accelerate.{prefix}rainfusion.of_bound.{density:.2f}",
            value=median(sparse[sparsity]) / bound,
            unit="times",
            better="lower",
            baseline=1.0,
            context=context_of(
                quick,
                tokens=tokens,
                sparsity=sparsity,
                dense_s=median(dense),
                sparse_s=median(sparse[sparsity]),
            ),
        )


def _seconds(call: Callable[[], object]) -> float:
    """The CPU seconds of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
