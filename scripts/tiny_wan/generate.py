"""Generates frames from prompts with one of the engines: `with engine(folder, ranks) as generate: generate(prompts,
seed, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import world
from .dit_training import FLOW_SHIFT

Generate = Callable[[list[str], int, float, int], list[np.ndarray]]
"""(prompts, seed, guidance_scale, steps) -> clips `[T,H,W,3]` in 0..1; clip i draws its noise from seed + i."""


@contextmanager
def runtime_engine(folder: Path, ranks: int) -> Iterator[Generate]:
    """The pack's runtime, with `ranks` processes that compute each video together."""
    from ascend_runtime.client.runtime import Runtime
    from ascend_runtime.specs import DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize

    model, encoder, vae = (kind(path=str(folder)) for kind in (DiffusionModelSpec, TextEncoderSpec, VaeSpec))
    size = VideoSize(width=world.SIZE, height=world.SIZE, num_frames=world.NUM_FRAMES)

    with Runtime(ParallelSpec(ranks=ranks)) as runtime:

        def generate(prompts: list[str], seed: int, guidance_scale: float, steps: int) -> list[np.ndarray]:
            start = torch.zeros(size.latent_shape())
            negative = runtime.encode(encoder, "").tensor
            clips = []
            for i, prompt in enumerate(tqdm(prompts, desc="clips", leave=False)):
                spec = SampleSpec(seed=seed + i, steps=steps, guidance_scale=guidance_scale, shift=FLOW_SHIFT)
                positive = runtime.encode(encoder, prompt).tensor
                latent = runtime.sample(model, spec, start, positive, negative).tensor
                clips.append(runtime.decode(vae, latent).tensor.numpy())
            return clips

        yield generate


@contextmanager
def diffusers_engine(folder: Path, ranks: int = 1, batch: int = 16) -> Iterator[Generate]:
    """diffusers' own `WanPipeline`, to compare with."""
    from diffusers import WanPipeline

    if ranks != 1:
        raise ValueError(f"diffusers uses one process, not {ranks}; omit --ranks or use --engine runtime")
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seed: int, guidance_scale: float, steps: int) -> list[np.ndarray]:
        clips: list[np.ndarray] = []
        for start in range(0, len(prompts), batch):
            chunk = prompts[start : start + batch]
            output = pipeline(
                chunk,
                height=world.SIZE,
                width=world.SIZE,
                num_frames=world.NUM_FRAMES,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
                output_type="np",
            )
            clips.extend(output.frames)
        return clips

    yield generate


ENGINES = {"runtime": runtime_engine, "diffusers": diffusers_engine}
