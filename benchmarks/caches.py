"""The denoising loop with each cache against the loop without: how much of the speed-up in FLOPs is reached.

A network of Wan's architecture with random weights makes a video on one rank with all cores. Caches that decide by data
are forced to skip two of three steps, so that random weights suffice.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Iterator

import torch
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from ascend_runtime import (
    AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec,
    StepCacheSpec,
)  # fmt: skip

from .report import Row, context_of

BAR = 0.93
STEPS = 12
SHAPE, QUICK_SHAPE = (1, 16, 3, 32, 32), (1, 16, 1, 8, 8)  # of the latent [B,C,T,H,W]
HEADS, QUICK_HEADS, HEAD_DIM, BLOCKS, TEXT = 4, 1, 128, 6, 64
ROUNDS = 5
EVERY_STEP = {"start": 2, "end": STEPS - 2}
CACHES = {
    "attention_cache": AccelerationSpec(attention_cache=AttentionCacheSpec(interval=4, **EVERY_STEP)),
    "block_cache": AccelerationSpec(block_cache=BlockCacheSpec(interval=4, first_block=1, last_block=4, **EVERY_STEP)),
    **{
        method: AccelerationSpec(step_cache=StepCacheSpec(method=method, threshold=100.0, most=2))
        for method in ("fbcache", "teacache", "magcache")
    },
    "taylorseer": AccelerationSpec(step_cache=StepCacheSpec(method="taylorseer", interval=3)),
}


def rows(quick: bool) -> Iterator[Row]:
    rounds, shape = (1, QUICK_SHAPE) if quick else (ROUNDS, SHAPE)
    with tempfile.TemporaryDirectory() as folder, Runtime(ParallelSpec(ranks=1), device="cpu") as runtime:
        _write(Path(folder), QUICK_HEADS if quick else HEADS)
        seconds, ideals = _measure(runtime, folder, shape, rounds)
    for name, ideal in ideals.items():
        seen = median(dense / cached for dense, cached in zip(seconds[None], seconds[name]))
        context = context_of(quick, steps=STEPS, latent=list(shape), rounds=rounds, ideal=round(ideal, 3),
                             seen=round(seen, 3), dense_s=round(median(seconds[None]), 3))  # fmt: skip
        yield Row(name=f"accelerate.{name}.of_ideal", value=seen / ideal, unit="share", better="higher", baseline=BAR,
                  context=context)  # fmt: skip


def _write(folder: Path, heads: int) -> None:
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=HEAD_DIM, ffn_dim=4 * heads * HEAD_DIM, num_layers=BLOCKS,
        text_dim=TEXT, freq_dim=64,
    )  # fmt: skip
    network.save_pretrained(folder / "transformer")
    known = {"high_noise": {"ratios": [1.0] * STEPS, "coefficients": [1.0, 0.0], "source": "made up"}}
    (folder / "ascend_calibration.json").write_text(json.dumps(known))


def _measure(runtime: Runtime, folder: str, shape: tuple[int, ...], rounds: int) -> tuple[dict, dict[str, float]]:
    """(seconds of each round by the cache's name, None without a cache; the speed-ups by FLOPs)."""
    text = torch.randn(2, 1, 20, TEXT, generator=torch.Generator().manual_seed(1))
    seconds: dict[str | None, list[float]] = {name: [] for name in (None, *CACHES)}
    ideals = {}

    def make(name: str | None) -> None:
        spec = SampleSpec(steps=STEPS, guidance_scale=5.0)
        model, acceleration = DiffusionModelSpec(path=folder), CACHES.get(name, AccelerationSpec())
        result = runtime.sample(model, spec, torch.zeros(shape), *text, acceleration=acceleration)
        seconds[name].append(result.seconds["denoise"])
        if name is not None:
            ideals[name] = result.info["acceleration"]["predicted_speed_up"]

    make(None)  # loads
    seconds[None].clear()
    for _ in tqdm(range(rounds), desc="videos"):
        for name in seconds:
            make(name)
    return seconds, ideals
