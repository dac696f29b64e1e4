"""A LoRA in a model: one more description; the ranks merge it."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..ascend_runtime.specs import LORA_EXPERTS, MAX_STRENGTH, LoraSpec
from . import model_files, types


class LoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendLoadLora",
            display_name="Ascend Load LoRA",
            category="Ascend",
            description="Adds a LoRA to the model. For several, put one node after the other.",
            inputs=[
                types.DiffusionModel.Input(
                    "model", tooltip="From Ascend Load Diffusion Model, or from another Ascend Load LoRA."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=model_files.names(model_files.LORA),
                    tooltip="A file of models/loras (.safetensors, .pt or .pth), for this Wan model: the layouts of "
                    "diffusers, PEFT, kohya and ComfyUI. Layers that do not fit the model are left out, which Ascend "
                    "Sampler and the log name; a file of which none fits is refused.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="How much of it is added; 0 is none of it. Another strength reads nothing of the model "
                    "again.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(LORA_EXPERTS),
                    default="both",
                    optional=True,
                    tooltip="Which of the two experts of Wan 2.2 gets it. A model without two experts: both; so too a "
                    "file that holds layers for each expert.",
                ),
            ],
            outputs=[
                types.DiffusionModel.Output(
                    display_name="model", tooltip="For Ascend Sampler, or for another Ascend Load LoRA."
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
