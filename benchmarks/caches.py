"""The denoising loop with each cache against the loop without: how much of the speed-up in FLOPs is reached.

A network of a family's architecture with random weights makes a video on one rank with all cores. Caches that decide by
data are forced to skip two of three steps, so that random weights suffice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Iterator

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from tqdm import tqdm

from ascend_runtime import (
    AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, Conditioning, DiffusionModelSpec, ParallelSpec, Runtime,
    SampleSpec, StepCacheSpec,
)  # fmt: skip

from .report import Row, context_of

BAR = 0.93
STEPS, ROUNDS = 12, 5
HEADS, QUICK_HEADS, HEAD_DIM, TEXT, POOLED = 4, 1, 128, 64, 32


def _wan(heads: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=HEAD_DIM, ffn_dim=4 * heads * HEAD_DIM, num_layers=6,
        text_dim=TEXT, freq_dim=64,
    )  # fmt: skip


def _hunyuan_video(heads: int) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=HEAD_DIM, num_layers=3, num_single_layers=6,
        text_embed_dim=TEXT, pooled_projection_dim=POOLED,
    )  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """network: of this number of heads. shape: of the latent [B,C,T,H,W], so large that a step takes 0.5 s on two
    cores. prefix: of the names of its figures. pooled: channels of a pooled vector. settings: of SampleSpec."""

    network: Callable[[int], ModelMixin]
    shape: tuple[int, ...]
    prefix: str = ""
    pooled: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "wan": Architecture(_wan, (1, 16, 3, 32, 32), settings={"guidance_scale": 5.0}),
    "hunyuan_video": Architecture(_hunyuan_video, (1, 16, 4, 32, 32), "hunyuan_video.", POOLED),
}
QUICK_SHAPE = (1, 16, 1, 8, 8)
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


def rows(quick: bool, family: str = "wan") -> Iterator[Row]:
    one = ARCHITECTURES[family]
    rounds, shape = (1, QUICK_SHAPE) if quick else (ROUNDS, one.shape)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, Runtime(ParallelSpec(ranks=1), device="cpu") as runtime:
        _write(Path(folder), one.network(QUICK_HEADS if quick else HEADS))
        seconds, ideals, loads = _measure(runtime, folder, one, shape, rounds)
    for name, ideal in ideals.items():
        seen = median(dense / cached for dense, cached in zip(seconds[None], seconds[name]))
        context = context_of(
            quick, steps=STEPS, latent=list(shape), rounds=rounds, ideal=round(ideal, 3), seen=round(seen, 3),
            dense_s=round(median(seconds[None]), 3), highest_load=max(loads),
        )  # fmt: skip
        yield Row(name=f"accelerate.{one.prefix}{name}.of_ideal", value=seen / ideal, unit="share", better="higher",
                  baseline=BAR, context=context)  # fmt: skip


def _write(folder: Path, network: ModelMixin) -> None:
    network.save_pretrained(folder / "transformer")
    known = {"high_noise": {"ratios": [1.0] * STEPS, "coefficients": [1.0, 0.0], "source": "made up"}}
    (folder / "ascend_calibration.json").write_text(json.dumps(known))


def _measure(
    runtime: Runtime, folder: str, one: Architecture, shape: tuple[int, ...], rounds: int
) -> tuple[dict[str | None, list[float]], dict[str, float], list[float]]:
    """(seconds of each round by the cache's name, None without a cache; the speed-ups by FLOPs; the machine's load
    before each round)."""
    draw = torch.Generator().manual_seed(1)
    prompts = [
        Conditioning(text=torch.randn(1, 20, TEXT, generator=draw),
                     pooled=torch.randn(1, one.pooled, generator=draw) if one.pooled else None)
        for _ in range(2)
    ]  # fmt: skip
    seconds: dict[str | None, list[float]] = {name: [] for name in (None, *CACHES)}
    ideals, loads = {}, []

    def make(name: str | None) -> None:
        spec = SampleSpec(steps=STEPS, **one.settings)
        model, acceleration = DiffusionModelSpec(path=folder), CACHES.get(name, AccelerationSpec())
        result = runtime.sample(model, spec, torch.zeros(shape), *prompts, acceleration=acceleration)
        seconds[name].append(result.seconds["denoise"])
        if name is not None:
            ideals[name] = result.info["acceleration"]["predicted_speed_up"]

    make(None)  # loads
    seconds[None].clear()
    for _ in tqdm(range(rounds), desc="videos"):
        loads.append(round(os.getloadavg()[0], 1))
        for name in seconds:
            make(name)
    return seconds, ideals, loads
