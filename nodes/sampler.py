"""Latent and CONDITIONING to a denoised latent."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

from comfy_api.latest import io
from torch import Tensor

from ..ascend_runtime.models.registry import schedules
from ..ascend_runtime.specs import AccelerationSpec, SampleSpec
from ..ascend_runtime.specs.jobs import MAX_SEED, MAX_STEP, SIMPLE, SOLVERS
from . import comfy_bridge, core_types, report, types
from .page.schema import DEVICES, FAMILIES, SAMPLING, TASKS, Schema

AUTO = "auto"
SWITCH = ["enable", "disable"]  # of core's KSamplerAdvanced
AUTOMATIC = "steps", "guidance_scale", "guidance_scale_low_noise", "shift", "embedded_guidance"  # 0: the model's own
HISTORY = "ascend_history"  # a further entry of a LATENT, which core's nodes hand on unread


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendSampler",
            display_name="Ascend Sampler",
            category=SAMPLING,
            search_aliases=[
                *FAMILIES, *(f"{one} sampler" for one in FAMILIES), *TASKS, *DEVICES, "ksampler", "denoise", "采样器",
            ],  # fmt: skip
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
                    tooltip="The size and length of the video: from Ascend Video Size or Ascend Image To Video. "
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
                    tooltip="The number of denoising steps. More steps take longer and show finer detail. "
                    "auto (0): the model's default.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the video follows the prompt. 1: the negative prompt is not used, and a "
                    "step takes half the work. auto (0): the model's default, which may differ between two experts, "
                    "and is 1 for HunyuanVideo.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=[AUTO, *SOLVERS],
                    default=AUTO,
                    tooltip="The solver of the denoising steps. auto: the model's own. unipc, dpm++: those of Wan's "
                    "own code. euler: "
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
                    tooltip="Moves the steps towards high noise. auto (0): the model's default, such as 5 for Wan "
                    "2.1, 12 for Wan2.2-T2V-A14B and 7 for HunyuanVideo.",
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
                    tooltip="cfg of the low-noise expert, for models with two experts such as Wan 2.2 A14B. "
                    "auto (0): the same as cfg; if cfg is auto too, the model's default.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Your own sigmas. They replace steps, scheduler and shift. Noise is always added: to "
                    "continue another sampler's unfinished latent, use Ascend Sampler (Advanced).",
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
                    "sets the number in the conditioning, that one is used. auto (0): the model's default (6).",
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
        prompts = {"positive": positive, "negative": negative}
        spec = _spec(
            sigmas, seed=seed, steps=steps, guidance_scale=cfg, guidance_scale_low_noise=cfg_low_noise, shift=shift,
            solver=sampler_name, schedule=scheduler, embedded_guidance=embedded_guidance,
        )  # fmt: skip
        return _sampled(model, spec, latent_image, prompts, profile=profile, acceleration=acceleration)


class SamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        """Its inputs are in the order of core's KSamplerAdvanced, with its names and values."""
        own = {one.id: one for one in deepcopy(Sampler.define_schema().inputs)}
        shared = {name: own.pop(name) for name in ("model", "steps", "cfg", "sampler_name", "scheduler", "positive",
                                                   "latent_image", "shift")}  # fmt: skip
        shared["latent_image"].tooltip = (
            "The size and length of the video, or the latent of a sampler that has left noise in it: this pack's, or "
            "core's KSampler (Advanced). What its noise_mask excludes stays as it is."
        )
        own["sigmas"].tooltip = "Your own sigmas. They replace steps, scheduler and shift."
        del own["seed"]
        inputs = shared | own | {one.id: one for one in _inputs_of_a_part()}
        order = ["model", "add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "positive",
                 "latent_image", "start_at_step", "end_at_step", "return_with_leftover_noise",
                 "shift", *own]  # fmt: skip
        return Schema(
            node_id="AscendSamplerAdvanced",
            display_name="Ascend Sampler (Advanced)",
            category=SAMPLING,
            search_aliases=[
                *FAMILIES, *(f"{one} sampler" for one in FAMILIES), *TASKS, *DEVICES, "ksampler advanced",
                "leftover noise", "采样器", "高级采样",
            ],
            advanced=("shift", "cfg_low_noise", "embedded_guidance"),
            automatic={"steps": 0, "cfg": 0.0, "shift": 0.0, "cfg_low_noise": 0.0, "embedded_guidance": 0.0},
            description="Computes a part of the denoising steps on all ranks, as core's KSampler (Advanced) does. Two "
            "in a row make the same latent as one Ascend Sampler.",
            inputs=[inputs[name] for name in order],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Ascend VAE Decode, or with leftover noise "
                                      "for the next sampler: another one of these, or core's.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model,
        add_noise,
        noise_seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        latent_image,
        start_at_step,
        end_at_step,
        return_with_leftover_noise,
        shift=0.0,
        negative=None,
        cfg_low_noise=0.0,
        sigmas=None,
        profile=None,
        acceleration=None,
        embedded_guidance=0.0,
    ) -> io.NodeOutput:
        total = steps if sigmas is None else len(sigmas) - 1
        if min(end_at_step, total or end_at_step) <= start_at_step:
            return io.NodeOutput(latent_image, ui=report.of_no_step(start_at_step, end_at_step, total))
        prompts = {"positive": positive, "negative": negative}
        spec = _spec(
            sigmas, seed=noise_seed, steps=steps, guidance_scale=cfg, guidance_scale_low_noise=cfg_low_noise,
            shift=shift, solver=sampler_name, schedule=scheduler, embedded_guidance=embedded_guidance,
            start_step=start_at_step, end_step=end_at_step, add_noise=add_noise == "enable",
            leftover_noise=return_with_leftover_noise == "enable",
        )  # fmt: skip
        return _sampled(model, spec, latent_image, prompts, profile=profile, acceleration=acceleration)


def _inputs_of_a_part() -> list[io.Input]:
    """Those that say which part of the steps a node computes, and what becomes of the noise."""
    step = {"min": 0, "max": MAX_STEP}
    return [
        io.Combo.Input(
            "add_noise",
            options=SWITCH,
            default="enable",
            tooltip="enable: adds the noise of start_at_step to the latent. disable: the latent has it already, such "
            "as one from a sampler that returned it with leftover noise.",
        ),
        io.Int.Input(
            "noise_seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=True,
            tooltip="Sets the noise that is added. With a noise_mask, give all samplers of a video the same one: it "
            "also sets the noise of what stays as it is.",
        ),
        io.Int.Input(
            "start_at_step",
            default=0,
            **step,
            tooltip="The first step that this node computes, counted from 0. steps and scheduler are those of the "
            "whole video, so give all samplers of a video the same ones.",
        ),
        io.Int.Input(
            "end_at_step",
            default=MAX_STEP,
            **step,
            tooltip="The step before which this node stops: start_at_step of the next sampler. A number above steps: "
            "this node computes all steps to the last.",
        ),
        io.Combo.Input(
            "return_with_leftover_noise",
            options=SWITCH[::-1],
            default="disable",
            tooltip="If this node stops early: enable returns the latent with the noise of end_at_step, for the next "
            "sampler. disable removes all noise in the last step that is computed.",
        ),
    ]


class Unfinished(NamedTuple):
    """What the next sampler needs to go on exactly (`Runtime.sample`), as long as the LATENT's samples are these."""

    samples: Tensor
    history: dict[str, Tensor]


def _spec(sigmas: Tensor | None, **settings) -> SampleSpec:
    """The spec of a node's widgets, in some of which 0 or AUTO stands for the model's own value."""
    own = {name: None if value == AUTO or name in AUTOMATIC and not value else value
           for name, value in settings.items()}  # fmt: skip
    return SampleSpec(**own, sigmas=None if sigmas is None else tuple(sigmas.tolist()))


def _sampled(model: types.ModelHandle, spec: SampleSpec, latent: dict, prompts: dict, **further) -> io.NodeOutput:
    """A node's output. prompts: CONDITIONING by name; None if there is none. further: profile and acceleration."""
    samples, unfinished = core_types.samples_of(latent), latent.get(HISTORY)
    continues = not spec.add_noise and unfinished is not None and unfinished.samples is samples
    further["acceleration"] = further["acceleration"] or AccelerationSpec()
    prompts = {name: one for name, one in prompts.items() if one is not None}
    given = {name: core_types.conditioning_of(one, name, samples) for name, one in prompts.items()}
    result = comfy_bridge.run_job(
        model.ranks,
        lambda runtime, hooks: runtime.sample(
            model.spec, spec, samples, **given, noise_mask=core_types.noise_mask_of(latent),
            parallel=model.ranks.parallel, operators=model.operators, warm_up=model.warm_up,
            history=unfinished.history if continues else None, **further, **hooks,
        ),
        preview=True,
    )  # fmt: skip
    made = {name: value for name, value in latent.items() if name != HISTORY} | {"samples": result.tensor}
    if result.tensors:
        made[HISTORY] = Unfinished(result.tensor, result.tensors)
    return io.NodeOutput(made, ui=report.of_sampling(result.info, result.record))
