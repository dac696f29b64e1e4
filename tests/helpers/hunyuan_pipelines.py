"""diffusers' own pipelines of small random HunyuanVideo models, and the same jobs for our runtime."""

import copy

import random_hunyuan
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec, VideoSize
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from msgspec.structs import replace
from PIL import Image
from torch import Tensor

SIZE = VideoSize(width=80, height=48, num_frames=9)  # 45 tokens
STEPS, SHIFT, SEED, GUIDANCE = 3, 7.0, 7, 6.0
TEXT, PADDED = 7, 12  # tokens of the prompt; with padding, as diffusers takes it


class Case:
    """A model of random_hunyuan.KINDS on disk, random prompts and a random image."""

    def __init__(self, kind: str, folder):
        self.kind, self.config = kind, random_hunyuan.config(kind)
        self.folder = random_hunyuan.folder(folder, kind)
        self.model = DiffusionModelSpec(path=str(folder))
        self.transformer, self.vae = random_hunyuan.transformer(kind), random_hunyuan.vae()
        generator = torch.Generator().manual_seed(21)
        pixels = torch.rand(SIZE.height, SIZE.width, 3, generator=generator).mul(255).round().byte()
        self.image = Image.fromarray(pixels.numpy())
        self.pixels = pixels.float() / 255
        self.texts = torch.randn(2, TEXT, self.config["text_embed_dim"], generator=generator)  # positive, negative
        self.pooled = torch.randn(2, self.config["pooled_projection_dim"], generator=generator)
        self.made = {}

    @torch.no_grad()
    def expected(self, *, cfg=1.0, dtype=torch.float32, batch=1, shift=SHIFT, **arguments) -> Tensor:
        """diffusers' latent, not normalised; or its frames [T, H, W, 3], for output_type="pt"."""
        key = str((cfg, dtype, batch, shift, arguments))
        if key not in self.made:
            pipeline = self._pipeline(dtype, shift)
            if self.kind != "t2v":
                arguments["image"] = self.image
            made = pipeline(
                height=SIZE.height, width=SIZE.width, num_frames=SIZE.num_frames, true_cfg_scale=cfg,
                generator=torch.Generator().manual_seed(SEED), **self._prompts(cfg, dtype, batch),
                **{"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "latent", **arguments},
            ).frames  # fmt: skip
            frames = "output_type" in arguments
            self.made[key] = made[0].movedim(1, -1) if frames else made.float() / self.scaling
        return self.made[key]

    @property
    def scaling(self) -> float:
        return self.vae.config.scaling_factor

    def _pipeline(self, dtype, shift):
        kind = HunyuanVideoPipeline if self.kind == "t2v" else HunyuanVideoImageToVideoPipeline
        without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        if self.kind != "t2v":
            without["image_processor"] = None
        pipeline = kind(
            transformer=copy.deepcopy(self.transformer).to(dtype), vae=self.vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), **without,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _prompts(self, cfg: float, dtype, batch: int) -> dict:
        padding = torch.randn(2, PADDED - TEXT, self.texts.shape[2], generator=torch.Generator().manual_seed(1))
        mask = (torch.arange(PADDED) < TEXT).expand(batch, -1)
        prompts = {}
        for number, prefix in enumerate(("", "negative_") if cfg != 1 else ("",)):
            embeds = torch.cat([self.texts[number], padding[number]]).expand(batch, -1, -1)
            prompts |= {f"{prefix}prompt_embeds": embeds.to(dtype), f"{prefix}prompt_attention_mask": mask,
                        f"{prefix}pooled_prompt_embeds": self.pooled[number].expand(batch, -1).to(dtype)}  # fmt: skip
        return prompts

    @torch.no_grad()
    def first_frame(self) -> Tensor:
        """The image's latent [1, 16, 1, H, W], not normalised."""
        video = self.pixels.movedim(-1, 0)[None, :, None] * 2 - 1
        return self.vae.encode(video).latent_dist.mode()

    def inputs(self) -> dict:
        """What `Runtime.sample` takes besides description and plan."""
        prompts = (Conditioning(text=text[None], pooled=pooled[None]) for text, pooled in zip(self.texts, self.pooled))
        inputs = {"latent": torch.zeros(SIZE.latent_shape()), **dict(zip(("positive", "negative"), prompts))}
        mask = torch.ones(1, 1, *inputs["latent"].shape[2:])
        mask[:, :, 0] = 0
        if self.kind == "i2v replace":
            inputs["latent"][:, :, :1] = self.first_frame()
            return {**inputs, "noise_mask": mask}
        if self.kind == "i2v concat":
            known = {"concat_latent": self.first_frame(), "concat_mask": mask}
            return inputs | {name: replace(inputs[name], **known) for name in ("positive", "negative")}
        return inputs

    def sample(self, runtime, *, plan=None, model=None, **changes) -> Tensor:
        """Our latent; see `result`."""
        return self.result(runtime, plan=plan, model=model, **changes).tensor

    def result(self, runtime, *, plan=None, model=None, **changes):
        """Our latent and facts. changes: of the spec, and of what `inputs` has."""
        own = {name: changes.pop(name) for name in (*self.inputs(), "noise_mask", "warm_up") if name in changes}
        spec = {"seed": SEED, "steps": STEPS, "image_start": self.kind != "t2v", **changes}
        parallel = ParallelSpec(ranks=runtime.world_size, **(plan or {}))
        arguments = {**self.inputs(), **own}
        return runtime.sample(model or self.model, SampleSpec(**spec), parallel=parallel, **arguments)
