"""Scaling of two ranks with one thread each on two cores, and a whole video against diffusers' own pipeline.

A block of Wan 1.3B's width runs on two ranks in each parallel mode and, in turns, as two independent blocks, which
together reach the maximum for two ranks.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Iterator

import torch
from tqdm import tqdm

from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize

from .report import Row, context_of

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny_wan"
SIZE = VideoSize(width=64, height=64, num_frames=17)
PROMPT = "a red circle moving right on a blue background"
SPEC = SampleSpec(seed=3, steps=20, guidance_scale=4.0, shift=3.0)


def run(quick: bool) -> Iterator[Row]:
    yield from _modes(quick)
    yield from _against_diffusers(quick)


# Modes


def _modes(quick: bool) -> Iterator[Row]:
    """Two processes; the first prints the seconds of every round as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scaling_rank", folder, *(["--quick"] if quick else [])]
        second = subprocess.Popen([*command, "--rank", "1"], stdout=subprocess.DEVNULL)
        try:
            output = subprocess.run([*command, "--rank", "0"], stdout=subprocess.PIPE, text=True, check=True).stdout
        finally:
            second.kill()
            second.wait()
    measured = json.loads(output)
    for name, rounds in measured["seconds"].items():
        # Blocks per second of both ranks: an independent round computes two blocks, a parallel one computes one.
        shares = [independent / (2 * shared) for independent, shared in rounds]
        context = context_of(
            quick,
            ranks=2,
            threads_a_rank=1,
            tokens=measured["tokens"],
            rounds=len(rounds),
            shared_s=round(median(shared for _, shared in rounds), 3),
            independent_s=round(median(independent for independent, _ in rounds), 3),
            slowest=round(min(shares), 3),
            fastest=round(max(shares), 3),
        )
        yield Row(name=f"scaling.{name}2", value=median(shares), unit="share", better="higher", baseline=0.97,
                  context=context)  # fmt: skip


# A whole video


def _against_diffusers(quick: bool) -> Iterator[Row]:
    """Text to frames on one rank and on two, in turns with diffusers' WanPipeline: same weights and solver, all
    cores."""
    rounds = 1 if quick else 5
    theirs = _Theirs()
    with Runtime(ParallelSpec(ranks=1), device="cpu") as one, Runtime(ParallelSpec(ranks=2), device="cpu") as two:
        makers = {"diffusers": theirs.make, "1": partial(_ours, one), "2": partial(_ours, two)}
        numbers = itertools.count()
        seconds = {name: [] for name in makers}
        for make in makers.values():
            make(next(numbers))  # loads
        for _ in tqdm(range(rounds), desc="whole videos"):
            for name, make in makers.items():
                start = time.perf_counter()
                make(next(numbers))
                seconds[name].append(time.perf_counter() - start)
    for ranks, bar in (("1", 1.02), ("2", 1.0)):
        ratios = [ours / them for ours, them in zip(seconds[ranks], seconds["diffusers"])]
        context = context_of(
            quick,
            job=f"{SIZE.num_frames} frames of {SIZE.width} x {SIZE.height}, {SPEC.steps} steps, assets/tiny_wan",
            rounds=rounds,
            ours_s=round(median(seconds[ranks]), 2),
            diffusers_s=round(median(seconds["diffusers"]), 2),
        )
        yield Row(name=f"scaling.pipeline{ranks}_vs_diffusers", value=median(ratios), unit="ratio", better="lower",
                  baseline=bar, context=context)  # fmt: skip


def _prompts(number: int) -> tuple[str, str]:
    """The positive and the negative prompt of a video, new each time, because ranks cache encoded prompts."""
    return f"{PROMPT} {number:02d}", f"blurry {number:02d}"


def _ours(runtime: Runtime, number: int) -> None:
    encoder = TextEncoderSpec(path=str(MODEL))
    texts = [runtime.encode(encoder, text).tensor for text in _prompts(number)]
    start = torch.zeros(SIZE.latent_shape())
    latent = runtime.sample(DiffusionModelSpec(path=str(MODEL)), SPEC, start, *texts).tensor
    runtime.decode(VaeSpec(path=str(MODEL)), latent)


class _Theirs:
    def __init__(self):
        from diffusers import UniPCMultistepScheduler, WanPipeline

        self._pipeline = WanPipeline.from_pretrained(MODEL)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SPEC.shift}
        self._pipeline.scheduler = UniPCMultistepScheduler(**flow)
        self._pipeline.set_progress_bar_config(disable=True)

    def make(self, number: int) -> None:
        positive, negative = _prompts(number)
        self._pipeline(
            prompt=positive,
            negative_prompt=negative,
            width=SIZE.width,
            height=SIZE.height,
            num_frames=SIZE.num_frames,
            num_inference_steps=SPEC.steps,
            guidance_scale=SPEC.guidance_scale,
            generator=torch.Generator().manual_seed(SPEC.seed),
            output_type="np",
        )
