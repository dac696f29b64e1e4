"""Small models of each family with a calibration next to them, and diffusers' own step caches on the same weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import random_hunyuan
import tiny_models
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, SampleSpec, VideoSize
from ascend_runtime.models.hunyuan_video.latents import SCALING
from ascend_runtime.recognition.calibration_file import calibration_file, write_calibration
from ascend_runtime.specs import Calibration
from torch import Tensor

SIZE = VideoSize(width=80, height=64, num_frames=9)
STEPS, SEED, SHIFT = 12, 5, 5.0
RATIOS_OF_STEPS = (1.0, *(1 - 0.004 * (step % 5) - 0.03 * (step > 9) for step in range(1, STEPS)))
TIMES = [1 - step / STEPS for step in range(STEPS + 1)]
SIGMAS = tuple(SHIFT * time / (1 + (SHIFT - 1) * time) for time in TIMES)


@dataclass(frozen=True)
class CachedModel:
    """blocks: their number. prompts: positive and negative. theirs: a step cache of diffusers -> the latent without
    guidance, not normalised, and the steps whose last block it left out. settings: of SampleSpec. image: the known
    first frame [1,C,1,H,W], not normalised."""

    folder: Path
    blocks: int
    prompts: tuple[Any, Any]
    theirs: Callable[[object], tuple[Tensor, list[int]]]
    settings: dict[str, Any] = field(default_factory=dict)
    image: Tensor | None = None

    @property
    def spec(self) -> DiffusionModelSpec:
        return DiffusionModelSpec(path=str(self.folder))

    def sample(self, runtime, guidance: float = 1.0, **options):
        sample = SampleSpec(seed=SEED, steps=STEPS, shift=SHIFT, guidance_scale=guidance, **self.settings)
        negative = None if guidance == 1 else self.prompts[1]
        latent = torch.zeros(SIZE.latent_shape())
        if self.image is not None:
            latent[:, :, :1], options["noise_mask"] = self.image, torch.ones(1, 1, *latent.shape[2:])
            options["noise_mask"][:, :, 0] = 0
        return runtime.sample(self.spec, sample, latent, self.prompts[0], negative, **options)


def calibrated(folder: Path) -> Path:
    """`folder` with a calibration for STEPS steps."""
    known = Calibration(coefficients=(0.1, 0.0), ratios=RATIOS_OF_STEPS, source="a test")
    write_calibration(calibration_file(str(folder)), {"high_noise": known})
    return folder


def watched(network, last: str) -> Callable[[], list[int]]:
    """What says in which passes through a network of diffusers its last block was left out. last: that block's
    attention, which no cache replaces."""
    calls, computed = [0], []
    network.get_submodule(last).register_forward_hook(lambda *_: computed.append(calls[0]))
    network.proj_out.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return lambda: sorted(set(range(calls[0])) - set(computed))


def wan(folder: Path, texts: tuple[Tensor, Tensor], layers: int = 3) -> CachedModel:
    """The model in `folder`, which has tiny_models' weights of this number of layers."""

    def theirs(config):
        pipeline = tiny_models.wan_pipeline(layers=layers)
        pipeline.transformer.enable_cache(config)
        left_out = watched(pipeline.transformer, "blocks.2.attn1")
        latent = pipeline(
            height=SIZE.height, width=SIZE.width, num_frames=SIZE.num_frames, num_inference_steps=STEPS,
            output_type="latent", generator=torch.Generator().manual_seed(SEED), guidance_scale=1.0,
            prompt_embeds=texts[0],
        ).frames  # fmt: skip
        return tiny_models.denormalised(latent, pipeline.vae), left_out()

    return CachedModel(calibrated(folder), layers, texts, theirs)


def hunyuan(folder: Path, kind: str = "t2v") -> CachedModel:
    """A HunyuanVideo model of text-to-video, or of "i2v replace", written to `folder`."""
    network = random_hunyuan.transformer(kind)
    inputs = [random_hunyuan.inputs(network.config, text=text, seed=text) for text in (7, 5)]
    prompts = tuple(Conditioning(text=one.text, pooled=one.pooled) for one in inputs)
    image = torch.randn(SIZE.latent_shape(), generator=torch.Generator().manual_seed(1))[:, :, :1]
    known = image if kind == "i2v replace" else image[:, :, :0]

    def theirs(config):
        network = random_hunyuan.transformer(kind)
        network.enable_cache(config)
        left_out = watched(network, "single_transformer_blocks.1.attn")
        x = torch.randn(SIZE.latent_shape(), generator=torch.Generator().manual_seed(SEED))
        with torch.no_grad(), network.cache_context("cond"):
            for sigma, following in zip(SIGMAS, SIGMAS[1:]):
                x[:, :, : known.shape[2]] = known * SCALING
                given = inputs[0]._replace(latent=x, timestep=torch.tensor([1000 * sigma]))
                x = x + (following - sigma) * random_hunyuan.diffusers_velocity(network, given)
        x[:, :, : known.shape[2]] = known * SCALING
        return x / SCALING, left_out()

    random_hunyuan.folder(folder, kind)
    return CachedModel(calibrated(folder), 4, prompts, theirs, {"solver": "euler", "sigmas": SIGMAS},
                       image if kind == "i2v replace" else None)  # fmt: skip
