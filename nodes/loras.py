"""LoRAs for a model: one of any kind, or few-step LoRAs with a switch."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..ascend_runtime.specs import LoraSpec
from ..ascend_runtime.specs.models import LORA_EXPERTS, MAX_STRENGTH
from . import model_files, types
from .loaders import NO_MODEL
from .page.schema import FAMILIES, LOADERS, Schema
from .page.validation import refusal


class LoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendLoadLora",
            display_name="Ascend Load LoRA",
            category=LOADERS,
            search_aliases=[*FAMILIES, "lora", "lora loader", "lightx2v", "4 steps", "lycoris"],
            advanced=("expert",),
            description="Adds a LoRA to the model. To use several LoRAs, chain several of these nodes.",
            inputs=[
                types.DiffusionModel.Input(
                    "model", tooltip="From Ascend Load Diffusion Model or from another Ascend Load LoRA."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=model_files.names(model_files.LORA),
                    tooltip="A LoRA for this model: a .safetensors, .pt or .pth file in models/loras, as diffusers, "
                    "PEFT, kohya, LyCORIS or ComfyUI write it, or PEFT's folder with adapter_config.json. Layers that "
                    "do not fit the model are skipped; Ascend Sampler and the log list them. A file without any layer "
                    "that fits is refused.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model. 0: not at all. A new strength does not read the "
                    "model again.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(LORA_EXPERTS),
                    default="both",
                    optional=True,
                    tooltip="Which expert gets the LoRA, in a model with two experts such as Wan 2.2 A14B. both: both "
                    "experts. Choose it also for a model with one expert, and for a file with layers for each expert.",
                ),
            ],
            outputs=[
                types.DiffusionModel.Output(
                    display_name="model", tooltip="For Ascend Sampler or for another Ascend Load LoRA."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name) -> bool | str:
        return model_files.check(lora_name, model_files.LORA)

    @classmethod
    def execute(cls, model, lora_name, strength, expert="both") -> io.NodeOutput:
        lora = LoraSpec(path=model_files.path_of(lora_name, model_files.LORA), strength=strength, expert=expert)
        return io.NodeOutput(replace(model, spec=model.spec.with_lora(lora)))


class FewStepLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        names = model_files.names(model_files.LORA)
        return Schema(
            node_id="AscendFewStepLora",
            display_name="Ascend Few-Step LoRA",
            category=LOADERS,
            search_aliases=["4 steps", "lightx2v", "lightning", "turbo", "distilled lora", "fast", "少步 加速 LoRA"],
            description="Switches few-step LoRAs on and off, one for each expert of a model. Ascend Sampler's "
            "automatic steps, cfg, shift and solver follow.",
            inputs=[
                types.DiffusionModel.Input(
                    "model", tooltip="From Ascend Load Diffusion Model or from Ascend Load LoRA."
                ),
                io.Boolean.Input(
                    "few_steps",
                    default=True,
                    tooltip="On: uses the LoRAs, whose files must exist. Off: uses none, and the number of steps is "
                    "what the model's authors recommend.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=names,
                    tooltip="A few-step LoRA in models/loras: of the high-noise expert, or of a model with one expert. "
                    "Ascend Sampler recognises its kind by its name, such as lightx2v_4steps.",
                ),
                io.Combo.Input(
                    "low_noise_lora_name",
                    options=[NO_MODEL, *names],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="The LoRA of the low-noise expert. none: lora_name is for the whole model.",
                ),
            ],
            outputs=[
                types.DiffusionModel.Output(
                    display_name="model", tooltip="For Ascend Sampler or for another Ascend Load LoRA."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, few_steps, lora_name, low_noise_lora_name=NO_MODEL) -> bool | str:
        return refusal(_loras, few_steps, lora_name, low_noise_lora_name)

    @classmethod
    def execute(cls, model, few_steps, lora_name, low_noise_lora_name=NO_MODEL) -> io.NodeOutput:
        spec = model.spec
        for lora in _loras(few_steps, lora_name, low_noise_lora_name):
            spec = spec.with_lora(lora)
        return io.NodeOutput(replace(model, spec=spec))


def _loras(few_steps: bool, name: str, low_noise_name: str) -> tuple[LoraSpec, ...]:
    """The LoRAs of a model's experts; none if the switch is off, so that their files may then be missing."""
    if not few_steps:
        return ()
    path = model_files.path_of(name, model_files.LORA)
    if low_noise_name == NO_MODEL:
        return (LoraSpec(path=path),)
    low = model_files.path_of(low_noise_name, model_files.LORA)
    return LoraSpec(path=path, expert="high_noise"), LoraSpec(path=low, expert="low_noise")
