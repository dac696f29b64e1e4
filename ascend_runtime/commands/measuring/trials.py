"""The small jobs whose times are measured: each with what the planner counts in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...client.runtime import Runtime
from ...planner import seconds
from ...planner.facts import Arrangement, Model, Network, Video
from ...planner.timing.fit import TimedJob
from ...specs import AccelerationSpec, DiffusionModelSpec, ParallelSpec, Plan, SampleSpec, VaeSpec
from ...wire.messages import Conditioning

PROMPT_TOKENS = 64
GUIDANCE_SCALE = 5.0


@dataclass(frozen=True)
class Trial:
    """A denoise loop. model: the planner's facts, with a small network; path: of that network. size: [T,H,W] of the
    latent. branches: 2 with guidance, else 1."""

    model: Model
    path: str
    size: tuple[int, int, int]
    steps: int
    arrangement: Arrangement
    branches: int = 2
    acceleration: AccelerationSpec = AccelerationSpec()

    @property
    def name(self) -> str:
        network, family = self.model.experts[0], self.model.family
        parts = [family.name, f"{family.width(network.config)} wide", "x".join(map(str, self.size)),
                 f"{self.steps} steps", f"plan {self.arrangement.plan}"]  # fmt: skip
        return ", ".join(parts + ["fsdp"] * self.arrangement.fsdp + ["one branch"] * (self.branches == 1))

    @property
    def video(self) -> Video:
        channels = self.model.family.form(self.model.experts[0].config).channels
        return Video((1, channels, *self.size), ((0, self.branches),) * self.steps, PROMPT_TOKENS,
                     acceleration=self.acceleration)  # fmt: skip

    @property
    def spec(self) -> DiffusionModelSpec:
        return DiffusionModelSpec(path=self.path, dtype=self.model.dtype)

    def run(self, runtime: Runtime) -> float:
        """Seconds of the denoise loop on these ranks."""
        guidance = GUIDANCE_SCALE if self.branches == 2 else 1.0
        prompts = _prompts(self.model)
        result = runtime.sample(
            self.spec, SampleSpec(steps=self.steps, guidance_scale=guidance), torch.zeros(self.video.shape), *prompts,
            parallel=request_of(self.arrangement), acceleration=self.acceleration,
        )  # fmt: skip
        return result.seconds["denoise"]

    def sample(self, took: float) -> TimedJob:
        return TimedJob(self.name, seconds.of_denoising(self.model, self.video, self.arrangement), took)


@dataclass(frozen=True)
class Decoding:
    """A decoded latent [1,C,T,H,W] of noise. vae: of the ranks' spec."""

    model: Model
    vae: VaeSpec
    size: tuple[int, int, int]
    arrangement: Arrangement

    @property
    def name(self) -> str:
        return f"{self.model.family.name}, VAE, {'x'.join(map(str, self.size))}, {self.arrangement.plan.ulysses} ranks"

    @property
    def video(self) -> Video:
        channels = self.model.family.vae_form(self.model.vae.config).channels
        return Video((1, channels, *self.size), ())

    def run(self, runtime: Runtime) -> float:
        generator = torch.Generator().manual_seed(0)
        return runtime.decode(self.vae, torch.randn(self.video.shape, generator=generator)).seconds["decode"]

    def sample(self, took: float) -> TimedJob:
        return TimedJob(self.name, seconds.of_decoding(self.model, self.video, self.arrangement), took)


def request_of(arrangement: Arrangement) -> ParallelSpec:
    """The request for exactly this arrangement."""
    plan = arrangement.plan
    return ParallelSpec(
        ranks=plan.cfg * plan.ring * plan.ulysses * plan.tp, **plan.info, fsdp=arrangement.fsdp,
        ring_exchange=arrangement.ring_exchange, overlap=arrangement.overlap,
    )  # fmt: skip


def one_for_each_axis(ranks: int, heads: int) -> Iterator[Arrangement]:
    """An arrangement for each axis, with all ranks on it as far as possible, and one with FSDP. heads: of the network,
    which tensor parallelism must divide."""
    if ranks == 1:
        yield Arrangement(Plan())
        return
    if ranks % 2 == 0:
        yield Arrangement(Plan(cfg=2, ulysses=ranks // 2))
    yield Arrangement(Plan(ulysses=ranks))
    yield Arrangement(Plan(ring=ranks))
    if heads % ranks == 0:
        yield Arrangement(Plan(tp=ranks))
    yield Arrangement(Plan(ulysses=ranks), fsdp=True)


def with_network(model: Model, network: Network) -> Model:
    return replace(model, experts=(network,))


def _prompts(model: Model) -> tuple[Conditioning, Conditioning]:
    """Noise in place of a positive and a negative prompt."""
    family, config = model.family, model.experts[0].config
    width = family.pooled_width(config)
    return tuple(
        Conditioning(text=torch.randn(1, PROMPT_TOKENS, family.text_width(config)),
                     pooled=torch.randn(1, width) if width else None)
        for _ in range(2)
    )  # fmt: skip
