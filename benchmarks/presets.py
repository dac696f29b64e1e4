"""The quality of each accelerator preset on the embedded model: PSNR and SSIM to the dense video, and how often a
reader of the frames finds the attributes of the prompt.

The held-out prompts of assets/tiny_wan, 20 steps, guidance 4; the accelerated video starts from the dense one's noise.
A
video this small is dense for RainFusion, whose mask blocks have 128 tokens: it makes larger ones, without the reader.
"""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

from ascend_runtime import (
    AccelerationSpec, DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize,
)  # fmt: skip
from ascend_runtime.specs.acceleration import METHOD_FIELDS
from ascend_runtime.commands.comparison.similarity import mean_ssim, psnr
from ascend_runtime.specs.presets import PRESETS, TABLE, chosen

from .report import Row, context_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # of the embedded model's world and its reader

from check_tiny_wan import score  # noqa: E402
from tiny_wan import world  # noqa: E402

MODEL = str(ROOT / "assets" / "tiny_wan")
STEPS, QUICK_STEPS, GUIDANCE, SHIFT = 20, 4, 4.0, 3.0  # like scripts/check_tiny_wan.py
BATCH = 8  # videos per job
SMALL = VideoSize(width=world.SIZE, height=world.SIZE, num_frames=world.NUM_FRAMES)
LARGE = VideoSize(width=128, height=128, num_frames=33)  # 576 tokens
PSNR = {"quality": 40.0, "balanced": 25.0, "fast": 20.0}  # dB, at least
SSIM = {"quality": 0.99, "balanced": 0.95, "fast": 0.8}
# By how many of 48 prompts the dense videos may be better. One is tolerated: invisible differences can change the
# reader's result for a clip that it can barely read.
LOST = {"quality": 1, "balanced": 2, "fast": 4}


def rows(quick: bool) -> Iterator[Row]:
    scenes = world.held_out_scenes()[: 2 if quick else None]
    presets = dict(list(_settings().items())[: 1 if quick else None])
    with Runtime(ParallelSpec(ranks=1), device="cpu") as runtime:
        small, large = _Comparison(runtime, SMALL, scenes, quick), _Comparison(runtime, LARGE, scenes[:BATCH], quick)
        for name, (preset, spec) in tqdm(presets.items(), desc="presets"):
            comparison = small if spec.rainfusion is None else large
            for what, (value, unit, bar) in comparison.figures(preset, spec).items():
                yield Row(name=f"accelerate.{name}.{what}", value=value, unit=unit, better="higher", baseline=bar,
                          context=comparison.context)  # fmt: skip


def _settings() -> dict[str, tuple[str, AccelerationSpec]]:
    """The presets and their specs, by names such as attention_cache.quality or step_cache.fbcache.fast."""
    settings = {}
    for kind, methods in TABLE.items():
        for method in methods:
            way = {METHOD_FIELDS[kind]: method} if method else {}
            for preset in PRESETS:
                name = ".".join(filter(None, (kind, method, preset)))
                settings[name] = preset, AccelerationSpec(**{kind: chosen(kind, preset, **way)})
    return settings


class _Comparison:
    """Videos of some scenes, BATCH at a time, and the dense ones from the same noise.

    context: of the last `figures`.
    """

    def __init__(self, runtime: Runtime, size: VideoSize, scenes: list[world.Scene], quick: bool):
        self._runtime, self._size, self._scenes, self._quick = runtime, size, scenes, quick
        self._steps = QUICK_STEPS if quick else STEPS
        encoder = TextEncoderSpec(path=MODEL)
        self._texts = [runtime.encode(encoder, scene.caption).tensor for scene in scenes]
        self._negative = runtime.encode(encoder, "").tensor

    def figures(self, preset: str, spec: AccelerationSpec) -> dict[str, tuple[float, str, float]]:
        """(value, unit, least) of each figure."""
        dense, _ = self._dense
        videos, info = self._videos(spec)
        pairs = [(torch.from_numpy(one), torch.from_numpy(other)) for one, other in zip(dense, videos)]
        # All videos at once, for their mean error: a single video may have none.
        whole = [torch.from_numpy(np.stack(some)) for some in (dense, videos)]
        found = {
            "psnr": (psnr(*whole), "dB", PSNR[preset]),
            "ssim": (fmean(mean_ssim(*pair) for pair in pairs), "", SSIM[preset]),
        }
        if self._size is SMALL:
            follow, followed = (score(some, self._scenes)["all four"] for some in (videos, dense))
            info |= {"follow": follow, "dense_follow": followed}
            least = 1 - LOST[preset] / max(followed, 1)
            found["prompt_following"] = (follow / followed if followed else 1.0, "share", least)
        self.context = context_of(self._quick, videos=len(dense), video=[self._size.width, self._size.height,
                                  self._size.num_frames], steps=self._steps, guidance=GUIDANCE, **info)  # fmt: skip
        return found

    @cached_property
    def _dense(self) -> tuple[list[np.ndarray], dict[str, float]]:
        return self._videos(AccelerationSpec())

    def _videos(self, spec: AccelerationSpec) -> tuple[list[np.ndarray], dict[str, float]]:
        """(videos [T,H,W,3] in 0..1, their reports)"""
        made, info = [], {}
        for first in range(0, len(self._texts), BATCH):
            texts = torch.cat(self._texts[first : first + BATCH])
            start = torch.zeros(len(texts), *self._size.latent_shape()[1:])
            sample = SampleSpec(seed=first, steps=self._steps, guidance_scale=GUIDANCE, shift=SHIFT)
            result = self._runtime.sample(
                DiffusionModelSpec(path=MODEL), sample, start, texts, self._negative, acceleration=spec
            )
            frames = self._runtime.decode(VaeSpec(path=MODEL), result.tensor).tensor
            made += list(frames.unflatten(0, (len(texts), -1)).numpy())
            for name in ("predicted_speed_up", "mean_density"):
                info.setdefault(name, []).append(result.info.get("acceleration", {}).get(name, 1.0))
        return made, {name: round(fmean(values), 3) for name, values in info.items()}
