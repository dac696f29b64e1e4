"""The start-up cost of a group of ranks, and whether its time and memory are stable over many jobs."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Iterator

import numpy as np
import psutil
import torch
from tqdm import tqdm

from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize

from .opens import Opened
from .report import Row, context_of

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny_wan"
STARTS, RUNS = 3, 50
QUICK_STARTS, QUICK_RUNS = 1, 6
SIZE = VideoSize(width=64, height=64, num_frames=5)
STEPS = 2


def run(quick: bool) -> Iterator[Row]:
    starts, runs = (QUICK_STARTS, QUICK_RUNS) if quick else (STARTS, RUNS)
    yield _cold_start(starts, quick)
    with tempfile.TemporaryDirectory() as folder:  # a copy, so that reads by others do not count
        model = shutil.copytree(MODEL, Path(folder) / MODEL.name)
        yield from _warm(str(model), runs, quick)


def _cold_start(starts: int, quick: bool) -> Row:
    """Two ranks from their start to the first answered null request, with the networks imported.

    The first start, which may read files from disk, counts only in a quick run.
    """
    seconds = []
    for _ in tqdm(range(starts if quick else starts + 1), desc="cold start"):
        with Runtime(ParallelSpec(ranks=2), device="cpu") as runtime:
            start = time.perf_counter()
            runtime.ping()
            seconds.append(time.perf_counter() - start)
    seconds = seconds[-starts:]
    context = context_of(quick, ranks=2, starts=starts, fastest=round(min(seconds), 2), slowest=round(max(seconds), 2))
    return Row(name="warm.cold_start_s", value=median(seconds), unit="s", better="lower", baseline=4.0, context=context)


def _warm(model: str, runs: int, quick: bool) -> Iterator[Row]:
    """The same whole job many times, with different prompts: text, a few steps with guidance, frames."""
    seconds, resident = [], []
    with Runtime(ParallelSpec(ranks=2), device="cpu") as runtime:
        _job(runtime, model, "")  # loads
        processes = [psutil.Process(pid) for pid in (psutil.Process().pid, *runtime.pids)]
        with Opened(Path(model).rglob("*.safetensors")) as opened:
            for run in tqdm(range(runs - 1), desc="warm runs"):
                start = time.perf_counter()
                _job(runtime, model, f" {run:02d}")
                seconds.append(time.perf_counter() - start)
                resident.append([process.memory_info().rss / 1e6 for process in processes])
    half = runs // 2 - 1
    early, late = median(seconds[:half]), median(seconds[half:])  # of runs 2-25 and 26-50, if there are 50
    slopes = np.polyfit(range(runs - 1), np.array(resident), 1)[0]  # MB per run: of the client, then of each rank
    context = context_of(
        quick,
        ranks=2,
        runs=runs,
        job=f"{SIZE.num_frames} frames of {SIZE.width} x {SIZE.height}, {STEPS} steps, assets/tiny_wan",
        early_s=round(early, 3),
        late_s=round(late, 3),
        slopes_mb=[round(float(slope), 4) for slope in slopes],
    )
    figures = (
        ("warm.late_over_early", late / early, "ratio", 1.02),
        ("warm.rss_slope_mb", sum(slopes), "MB/run", 1.0),
        ("warm.weight_opens", len(opened.files()), "files", 0),
    )
    for name, value, unit, bar in figures:
        yield Row(name=name, value=float(value), unit=unit, better="lower", baseline=bar, context=context)


def _job(runtime: Runtime, model: str, suffix: str) -> None:
    """suffix: of both prompts, because ranks cache encoded prompts."""
    encoder = TextEncoderSpec(path=model)
    prompts = (f"A red circle moves to the right.{suffix}", f"blurry{suffix}")
    texts = [runtime.encode(encoder, text).tensor for text in prompts]
    start = torch.zeros(SIZE.latent_shape())
    latent = runtime.sample(DiffusionModelSpec(path=model), SampleSpec(steps=STEPS), start, *texts).tensor
    runtime.decode(VaeSpec(path=model), latent)
