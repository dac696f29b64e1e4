"""A switch between all steps of a model and the few steps of a LoRA."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ...ascend_runtime.specs import LoraSpec
from .. import model_files, types
from ..loaders import NO_MODEL
from ..page.schema import LOADERS, Schema
from ..validation import refusal


class FewStepLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        names = model_files.names(model_files.LORA)
        return Schema(
            node_id="AscendFewStepLora",
            display_name="Ascend Few-Step LoRA",
            category=LOADERS,
            search_aliases=["4 steps", "lightx2v", "lightning", "turbo", "distilled lora", "fast", "少步 加速 LoRA"],
            description="Switches LoRAs for few steps on and off: one for each expert of a model. Ascend Sampler's "
            "automatic steps, cfg, shift and solver follow.",
            inputs=[
                types.DiffusionModel.Input(
                    "model", tooltip="From Ascend Load Diffusion Model or from Ascend Load LoRA."
                ),
                io.Boolean.Input(
                    "few_steps",
                    default=True,
                    tooltip="On: with the LoRAs, whose files must be there. Off: without them, in the steps that the "
                    "model's authors recommend.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=names,
                    tooltip="A LoRA for few steps in models/loras: of the high-noise expert, or of a model with one "
                    "expert. Its name shows its kind, such as lightx2v_4steps; Ascend Sampler reads it.",
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
    """The LoRAs of a model's experts; none without few steps, so that their files may then be missing."""
    if not few_steps:
        return ()
    path = model_files.path_of(name, model_files.LORA)
    if low_noise_name == NO_MODEL:
        return (LoraSpec(path=path),)
    low = model_files.path_of(low_noise_name, model_files.LORA)
    return LoraSpec(path=path, expert="high_noise"), LoraSpec(path=low, expert="low_noise")
