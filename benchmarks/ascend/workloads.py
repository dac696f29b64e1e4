"""Published workloads, made here, against the published seconds. Nothing is scaled to other sizes or settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator

import torch
from msgspec.structs import replace
from torch import Tensor

from ascend_runtime import (
    Conditioning,
    DiffusionModelSpec,
    OperatorSpec,
    Runtime,
    TextEncoderSpec,
    VaeSpec,
    VideoSize,
)
from ascend_runtime.client.submission import Result
from ascend_runtime.models.registry import family

from ..report import Notes, Row, context_of
from .machine import Cards
from .published import LEFT_OUT, PUBLISHED, Workload

PROMPT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
GREY = 0.5  # of frames that are not known


def chosen(text: str | None) -> tuple[Workload, ...]:
    """The published workloads whose name contains `text`, shortest first, so that an early end has many figures."""
    found = [workload for workload in PUBLISHED if text is None or text in workload.name]
    if not found:
        names = "\n".join(workload.name for workload in PUBLISHED)
        raise SystemExit(
            f"--only is {text!r}, and no published workload has that in its name. These are there:\n{names}"
        )
    return tuple(sorted(found, key=lambda workload: workload.seconds))


def measure(
    workloads: Iterable[Workload], cards: Cards, models: Path | None, quick: bool, notes: Notes
) -> Iterator[Row]:
    for name, why in LEFT_OUT.items():
        notes.leave_out(name, why)
    for workload in workloads:
        if why := _why_not(workload, cards, models, quick):
            notes.leave_out(f"{workload.name} ({workload.seconds:g} s)", why)
            continue
        with notes.noted(workload.name):
            yield run(workload, cards, models)


def _why_not(workload: Workload, cards: Cards, models: Path | None, quick: bool) -> str | None:
    if cards.kind == "cpu":
        return "it needs accelerators, and this is a CPU"
    if workload.kind != cards.kind:
        return f"it was published for {workload.card.upper()}, and these are other devices ({cards.kind})"
    if quick:
        return "--quick runs no published workload"
    if workload.parallel.ranks > cards.count:
        return f"it takes {workload.parallel.ranks} cards, and {cards.count} are visible"
    if models is None:
        return "--models DIR does not say where the published models are"
    if not (models / workload.folder / "model_index.json").is_file():
        return f"{models / workload.folder} is not a diffusers folder"
    return None


def run(workload: Workload, cards: Cards, models: Path) -> Row:
    """One video, after a warm-up of each of its parts."""
    with Runtime(workload.parallel, device=cards.kind) as runtime:
        maker = Maker(runtime, workload, str(models / workload.folder))
        maker.warm_up()
        seconds = maker.make()
    size, sample, (cfg, ulysses, tp) = workload.size, workload.sample, workload.plan
    context = context_of(
        False, cards.kind, device_name=cards.name, published_on=workload.card, ranks=workload.parallel.ranks,
        cfg_degree=cfg, ulysses_degree=ulysses, tp_degree=tp, fsdp=workload.fsdp, attention=workload.attention,
        model=workload.folder, task=workload.task, steps=sample.steps, source=workload.source, seconds=seconds,
        job=f"{size.num_frames} frames of {size.width} x {size.height}, {sample.steps} steps",
        **({"device_memory": maker.device_memory} if maker.device_memory else {}),
        **({"published_speed_up": workload.speed_up} if workload.speed_up else {}),
        **({"not_compared": why} if (why := _not_comparable(workload, cards)) else {}),
    )  # fmt: skip
    return Row(
        name=f"ascend.{workload.name}_s", value=seconds["denoise"] if workload.denoising else sum(seconds.values()),
        unit="s", better="lower", baseline=workload.seconds, context=context,
    )  # fmt: skip


def _not_comparable(workload: Workload, cards: Cards) -> str:
    """Why the published seconds are of something else; empty if they are not."""
    same = workload.card == cards.line or re.search(rf"\b{workload.card}\b", cards.name)  # an H200 is no H20
    other = "" if same else f"published for {workload.card.upper()}, measured on {cards.name or 'unknown cards'}"
    return "; ".join(filter(None, (workload.differs, other)))


@dataclass
class Maker:
    """The steps of one video on a group of ranks, and what each took. path: of the model.

    The text encoders are shared by all ranks, on their cards, as in the published runs.
    """

    runtime: Runtime
    workload: Workload
    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    device_memory: str = ""  # the most that a rank's torch took of its card

    def __post_init__(self):
        self.encoder = TextEncoderSpec(path=self.path, placement="ranks")
        self.vae, self.model = VaeSpec(path=self.path), DiffusionModelSpec(path=self.path)
        self.form = self.runtime.vae_form(self.vae)
        self.shape = self.form.latent_shape(self.workload.size)

    def warm_up(self) -> None:
        """Loads all networks and runs the first two of them and the VAE; denoising warms up with the job itself."""
        self.runtime.load(self.model, self.encoder, self.vae)
        self.runtime.encode(self.encoder, "warm-up")
        if self.workload.task != "t2v":
            self.runtime.encode_video(self.vae, self._known_frames())
        self.runtime.decode(self.vae, torch.zeros(self.shape))

    def make(self) -> dict[str, float]:
        """The seconds of each stage."""
        texts = (PROMPT, "") if self.workload.sample.guidance_scale != 1 else (PROMPT,)
        prompts = [self._timed("text", self.runtime.encode(self.encoder, text)).conditioning for text in texts]
        latent, conditionings, mask = self._inputs(prompts)
        sampled = self.runtime.sample(
            self.model, self.workload.sample, latent, *conditionings, noise_mask=mask, warm_up=True,
            operators=OperatorSpec(attention=self.workload.attention), acceleration=self.workload.acceleration,
        )  # fmt: skip
        self.device_memory = sampled.info.get("device memory", "")
        self._timed("decode", self.runtime.decode(self.vae, self._timed("denoise", sampled).tensor))
        return self.seconds

    def _timed(self, stage: str, result: Result) -> Result:
        took = sum(result.seconds[name] for name in result.seconds.keys() & {"encode", "denoise", "decode"})
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        return result

    def _inputs(self, prompts: list[Conditioning]) -> tuple[Tensor, list[Conditioning], Tensor | None]:
        """(start latent, conditioning of the branches, noise mask), as Ascend Image To Video makes them."""
        if self.workload.task == "t2v":
            return torch.zeros(self.shape), prompts, None
        known = self._timed("image", self.runtime.encode_video(self.vae, self._known_frames())).tensor
        if self.workload.task == "ti2v":
            latent, mask = family(self.form.family).empty_latent(self.shape), torch.ones(1, 1, *self.shape[2:])
            latent[:, :, :1], mask[:, :, :1] = known, 0
            return latent, prompts, mask
        mask = torch.ones(1, 4, *self.shape[2:])  # 4 for each latent frame
        mask[:, :, 0] = 0
        return torch.zeros(self.shape), [replace(one, concat_latent=known, concat_mask=mask) for one in prompts], None

    def _known_frames(self) -> Tensor:
        """The frames [T, H, W, 3] that the VAE encodes: the image, for i2v as the first of a grey video."""
        size = self.workload.size
        video = torch.full((1 if self.workload.task == "ti2v" else size.num_frames, size.height, size.width, 3), GREY)
        video[0] = start_image(size)
        return video


def start_image(size: VideoSize) -> Tensor:
    """A picture [H, W, 3] in 0..1: a red disc in the middle of a field whose green and blue rise to its edges."""
    height, width = (torch.linspace(0, 1, side) for side in (size.height, size.width))
    down, right = torch.meshgrid(height, width, indexing="ij")
    disc = ((down - 0.5) ** 2 + (right - 0.5) ** 2 < 0.04).float()
    return torch.stack((disc, down * (1 - disc), right * (1 - disc)), dim=-1)
