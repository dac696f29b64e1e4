"""Published workloads, run as published, against the published seconds. Nothing is scaled to other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch

from ascend_runtime import (
    DiffusionModelSpec,
    OperatorSpec,
    ParallelSpec,
    Runtime,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
    VideoSize,
)

from .report import Failures, Row, context_of, leave_out

PROMPT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."


@dataclass(frozen=True)
class Workload:
    """folder: the model's. plan: degrees (cfg, ulysses, tp), whose product is the number of cards. seconds: published
    by `source`, for text, denoising and decoding of one video, without loading."""

    name: str
    folder: str
    size: VideoSize
    sample: SampleSpec
    plan: tuple[int, int, int]
    seconds: float
    source: str
    attention: str = "fused"

    @property
    def parallel(self) -> ParallelSpec:
        cfg, ulysses, tp = self.plan
        degrees = {"cfg_degree": cfg, "ring_degree": 1, "ulysses_degree": ulysses, "tp_degree": tp}
        return ParallelSpec(ranks=cfg * ulysses * tp, **degrees)


A14B = SampleSpec(steps=40, guidance_scale=4.0, guidance_scale_low_noise=3.0, shift=12.0)
WAN_21 = SampleSpec(steps=50, guidance_scale=5.0, shift=5.0)
PLANS_14B = {(1, 1, 1): 860.2, (1, 1, 2): 502.8, (2, 1, 1): 332.6, (1, 2, 1): 327.6, (1, 1, 4): 204.0,
             (2, 1, 2): 175.8, (1, 4, 1): 151.1, (2, 2, 1): 147.9, (1, 1, 8): 141.5, (2, 1, 4): 102.9,
             (1, 8, 1): 78.1, (2, 4, 1): 76.4}  # fmt: skip
PUBLISHED = (
    *(
        Workload(
            f"t2v_14b_480p_cfg{cfg}_ulysses{ulysses}_tp{tp}", "Wan2.1-T2V-14B-Diffusers",
            VideoSize(width=832, height=480), WAN_21, (cfg, ulysses, tp), seconds,
            "MindIE's published table for Wan2.1, Atlas 800I A2",
        )
        for (cfg, ulysses, tp), seconds in PLANS_14B.items()
    ),
    Workload(
        "t2v_a14b_720p_8_cards", "Wan2.2-T2V-A14B-Diffusers", VideoSize(width=1280, height=720), A14B, (2, 4, 1),
        435.99, "MindIE's published table for Wan2.2, eight cards of an Atlas 800I A2, ALGO=1", attention="laser",
    ),
)  # fmt: skip
NOT_YET = {
    "ti2v_5b_704p_8_cards (72.21 s)": "this benchmark only makes text-to-video",
    "i2v_a14b_720p_8_cards (436.42 s)": "this benchmark only makes text-to-video",
}


def measure(kind: str, cards: int, models: Path | None, quick: bool, failures: Failures) -> Iterator[Row]:
    for name, why in NOT_YET.items():
        leave_out(name, why)
    for workload in PUBLISHED:
        if why := _why_not(workload, kind, cards, models, quick):
            leave_out(f"{workload.name} ({workload.seconds} s)", why)
            continue
        with failures.noted(workload.name):
            yield run(workload, kind, models)


def _why_not(workload: Workload, kind: str, cards: int, models: Path | None, quick: bool) -> str | None:
    if kind == "cpu":
        return "it needs accelerators, and this is a CPU"
    if quick:
        return "--quick runs no published workload"
    if workload.parallel.ranks > cards:
        return f"it takes {workload.parallel.ranks} cards, and {cards} are visible"
    if models is None:
        return "--models DIR does not say where the published models are"
    if not (models / workload.folder / "model_index.json").is_file():
        return f"{models / workload.folder} is not a diffusers folder"
    return None


def run(workload: Workload, kind: str, models: Path) -> Row:
    """One video, after a warm-up of the whole workload."""
    path = str(models / workload.folder)
    cfg, ulysses, tp = workload.plan
    encoder, vae, model = TextEncoderSpec(path=path), VaeSpec(path=path), DiffusionModelSpec(path=path)
    stages: dict[str, float] = {}
    with Runtime(workload.parallel, device=kind) as runtime:
        runtime.load(model, encoder, vae)
        texts = [runtime.encode(encoder, text) for text in (PROMPT, "")]
        start = torch.zeros(workload.size.latent_shape())
        runtime.decode(vae, start)
        operators = OperatorSpec(attention=workload.attention)
        sampled = runtime.sample(
            model, workload.sample, start, *(text.tensor for text in texts), operators=operators, warm_up=True
        )
        decoded = runtime.decode(vae, sampled.tensor)
    for result in (*texts, sampled, decoded):
        for stage in result.seconds.keys() & {"encode", "denoise", "decode"}:
            stages[stage] = stages.get(stage, 0.0) + result.seconds[stage]
    size = workload.size
    context = context_of(
        False, kind, ranks=workload.parallel.ranks, cfg_degree=cfg, ulysses_degree=ulysses, tp_degree=tp,
        attention=workload.attention, model=workload.folder, steps=workload.sample.steps, source=workload.source,
        job=f"{size.num_frames} frames of {size.width} x {size.height}", seconds=stages,
    )  # fmt: skip
    return Row(
        name=f"ascend.{workload.name}_s", value=sum(stages.values()), unit="s", better="lower",
        baseline=workload.seconds, context=context,
    )  # fmt: skip
