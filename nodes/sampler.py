"""Latent and CONDITIONING to a denoised latent."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..ascend_runtime.acceleration.report import plan_words, words_of
from ..ascend_runtime.models.registry import schedules
from ..ascend_runtime.specs import AccelerationSpec, SampleSpec
from ..ascend_runtime.specs.jobs import MAX_SEED, SIMPLE, SOLVERS
from . import comfy_bridge, core_types, types
from .page.schema import DEVICES, FAMILIES, SAMPLING, TASKS, Schema


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendSampler",
            display_name="Ascend Sampler",
            category=SAMPLING,
            search_aliases=[*FAMILIES, *TASKS, *DEVICES, "ksampler", "sampler", "denoise", "采样器"],
            advanced=("cfg_low_noise", "embedded_guidance"),
            automatic={"steps": 0, "cfg": 0.0, "shift": 0.0, "cfg_low_noise": 0.0, "embedded_guidance": 0.0},
            description="Denoises a video latent on all ranks.",
            inputs=[
                types.DiffusionModel.Input("model", tooltip="From Ascend Load Diffusion Model or Ascend Load LoRA."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the video should show: from Ascend Text Encode, or from Ascend Image To Video for an "
                    "image-to-video model. Core's nodes work too.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The size and length of the video: from EmptyHunyuanLatentVideo or Ascend Image To Video. "
                    "To start from the latent's content, connect sigmas that begin below 1. What its noise_mask "
                    "excludes stays as it is.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Sets the noise to start from. The same seed gives the same video on any number of ranks.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="The number of denoising steps. More steps take longer and show finer detail. 0: the "
                    "model's default.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the video follows the prompt. 1: the negative prompt is not used, and a "
                    "step takes half the work. 0: the model's default, which may differ between two experts, and is 1 "
                    "for HunyuanVideo.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SOLVERS),
                    default="unipc",
                    tooltip="The solver of the denoising steps. unipc, dpm++: the solvers of Wan's own code. euler: "
                    "the one of HunyuanVideo's own code and of most core workflows.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[*schedules(), SIMPLE],
                    default=schedules()[0],
                    tooltip="How the noise levels (sigmas) of the steps are spaced. wan, hunyuan_video: the model's "
                    "own schedule; either name works with any model. simple: as core's scheduler of that name.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Moves the steps towards high noise. 0: the model's default, such as 5 for Wan 2.1, 12 "
                    "for Wan2.2-T2V-A14B and 7 for HunyuanVideo.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the video should not show. Not needed if cfg is 1."
                ),
                io.Float.Input(
                    "cfg_low_noise",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="cfg of the low-noise expert, for models with two experts such as Wan 2.2 A14B. 0: the "
                    "same as cfg; if cfg is 0 too, the model's default.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Your own sigmas. They replace steps, scheduler and shift. Noise is always added, so this "
                    "node cannot continue another sampler's unfinished latent.",
                ),
                types.Profile.Input(
                    "profile",
                    optional=True,
                    tooltip="From Ascend Profiler: records some steps, to show what takes time.",
                ),
                types.Acceleration.Input(
                    "acceleration",
                    optional=True,
                    tooltip="From Ascend AttentionCache, Block Cache, Step Cache or RainFusion: skips a part of the "
                    "work. This node and the log show what it saved.",
                ),
                io.Float.Input(
                    "embedded_guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="How strongly the video follows the prompt, for models that read this number as an input: "
                    "HunyuanVideo, except its image-to-video model v1. It costs no time. If core's FluxGuidance "
                    "sets the number in the conditioning, that one is used. 0: the model's default (6).",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Ascend VAE Decode or core's VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        shift,
        negative=None,
        cfg_low_noise=0.0,
        sigmas=None,
        profile=None,
        acceleration=None,
        embedded_guidance=0.0,
    ) -> io.NodeOutput:
        spec = SampleSpec(
            seed=seed,
            steps=steps or None,
            guidance_scale=cfg or None,
            guidance_scale_low_noise=cfg_low_noise or None,
            solver=sampler_name,
            schedule=scheduler,
            shift=shift or None,
            embedded_guidance=embedded_guidance or None,
            sigmas=None if sigmas is None else tuple(sigmas.tolist()),
        )
        samples = core_types.samples_of(latent_image)
        result = comfy_bridge.run_job(
            model.ranks,
            lambda runtime, hooks: runtime.sample(
                model.spec,
                spec,
                samples,
                core_types.conditioning_of(positive, "positive", samples),
                None if negative is None else core_types.conditioning_of(negative, "negative", samples),
                noise_mask=core_types.noise_mask_of(latent_image),
                parallel=model.ranks.parallel,
                operators=model.operators,
                warm_up=model.warm_up,
                profile=profile,
                acceleration=acceleration or AccelerationSpec(),
                **hooks,
            ),
            preview=True,
        )
        lines = [words_of(result.info, result.seconds), *plan_words(result.info), *result.info.get("warnings", ())]
        report = "\n".join(lines)
        return io.NodeOutput({**latent_image, "samples": result.tensor}, ui=ui.PreviewText(report))
