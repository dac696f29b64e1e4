"""Loaders: a name and a dtype become a description; the ranks read the weights when a job first needs them."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..ascend_runtime.specs import DiffusionModelSpec, LoraSpec, OperatorSpec, TextEncoderSpec, VaeSpec
from ..ascend_runtime.specs.jobs import ATTENTIONS
from ..ascend_runtime.specs.models import COMPUTE_DTYPES, LORA_EXPERTS, MAX_STRENGTH, PLACEMENTS, QUANTIZATIONS
from . import model_files, types
from .types import Handle, ModelHandle, RanksHandle
from .validation import refusal

NO_MODEL = "none"


def dtype_input(automatic: str) -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=list(COMPUTE_DTYPES),
        default="auto",
        tooltip=f"Number format to compute in. auto: {automatic}.",
    )


class LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = model_files.names(model_files.TRANSFORMER)
        return io.Schema(
            node_id="AscendLoadDiffusionModel",
            display_name="Ascend Load Diffusion Model",
            category="Ascend",
            description="Picks the Wan transformer that Ascend Sampler runs on all ranks.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    tooltip="A folder of models/diffusers as diffusers, the original, MindSpeed-MM or msModelSlim "
                    "write it (both experts of Wan 2.2 in one), or a file of models/diffusion_models, also fp8. What "
                    "it is, is decided by its content. embedded/tiny_wan comes with the pack and runs anywhere.",
                ),
                dtype_input("float32 on a CPU, bfloat16 on an NPU or GPU"),
                io.Combo.Input(
                    "low_noise_model_name",
                    options=[NO_MODEL, *names],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="The low-noise expert of Wan 2.2, where it is a file of its own. model_name is then the "
                    "high-noise expert.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default="auto",
                    optional=True,
                    tooltip="How an NPU computes attention; CPU and GPU use torch's own.\n"
                    "auto: what the variable ALGO asks for, else fused.\n"
                    "fused: CANN's flash attention.\n"
                    "laser: MindIE SD's laser attention, whose products are float16.\n"
                    "infer: CANN's attention for inference.\n"
                    "fastest: MindIE SD tries what it has on each new shape and keeps the fastest; videos may differ a "
                    "little from run to run.\n"
                    "fp8: approximate, 8-bit products; only on cards that have them (950 series).\n"
                    "plain: torch's own.",
                ),
                io.Int.Input(
                    "heads_per_call",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="Heads that are computed at once; fewer take less memory and more time. 0: all, unless the "
                    "variable USE_SUB_HEAD asks for a number.",
                ),
                io.Boolean.Input(
                    "warm_up",
                    default=False,
                    optional=True,
                    tooltip="Before the first video of a size, two steps are made and thrown away, so that compiling "
                    "operators is not part of the video's own time. The video is the same.",
                ),
                types.parallel_input(),
                io.Combo.Input(
                    "quantization",
                    options=list(QUANTIZATIONS),
                    default="none",
                    optional=True,
                    tooltip="Whether linear layers compute in 8 bits. It is an approximation, and takes no LoRA.\n"
                    "none: as the files are, which may be quantized themselves.\n"
                    "w8a8_dynamic: weights are made integers of 8 bits as they are read, which halves what these "
                    "layers weigh against bfloat16, and each token as it comes.",
                ),
            ],
            outputs=[types.DiffusionModel.Output(display_name="model", tooltip="For Ascend Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name, low_noise_model_name=NO_MODEL) -> bool | str:
        return refusal(_transformers, model_name, low_noise_model_name)

    @classmethod
    def execute(
        cls,
        model_name,
        dtype,
        low_noise_model_name=NO_MODEL,
        attention="auto",
        heads_per_call=0,
        warm_up=False,
        parallel=None,
        quantization="none",
    ) -> io.NodeOutput:
        path, low_noise = _transformers(model_name, low_noise_model_name)
        spec = DiffusionModelSpec(path=path, low_noise_path=low_noise, dtype=dtype, quantization=quantization)
        operators = OperatorSpec(attention=attention, heads_per_call=heads_per_call)
        return io.NodeOutput(ModelHandle(spec, parallel or RanksHandle(), operators, warm_up))


def _transformers(model_name: str, low_noise_model_name: str) -> tuple[str, str | None]:
    """The paths of a transformer and of the low-noise expert, if that is a file of its own."""
    path = model_files.path_of(model_name, model_files.TRANSFORMER)
    if low_noise_model_name == NO_MODEL:
        return path, None
    return path, model_files.path_of(low_noise_model_name, model_files.TRANSFORMER)


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendLoadTextEncoder",
            display_name="Ascend Load Text Encoder",
            category="Ascend",
            description="Picks the UMT5 text encoder. It runs on the CPU of one rank, or on the devices of all.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files.names(model_files.TEXT_ENCODER),
                    tooltip="A folder of models/diffusers as diffusers or the original write it, or a file of "
                    "models/text_encoders. ComfyUI's files bring their tokenizer along; next to the original's .pth "
                    "must lie its folder google/umt5-xxl.",
                ),
                dtype_input("on a CPU float32 if it is smaller than 1 GiB, else bfloat16; on an NPU or GPU bfloat16"),
                types.parallel_input(),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENTS),
                    default="auto",
                    optional=True,
                    tooltip="Where it runs.\n"
                    "auto: what the variable T5_LOAD_CPU asks for on NPUs (1: cpu, 0: ranks), else cpu.\n"
                    "cpu: on the CPU of one rank; takes no card's memory.\n"
                    "ranks: on the devices of all ranks, each of which holds a share of the weights.",
                ),
            ],
            outputs=[types.TextEncoder.Output(display_name="text_encoder", tooltip="For Ascend Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        return model_files.check(model_name, model_files.TEXT_ENCODER)

    @classmethod
    def execute(cls, model_name, dtype, parallel=None, placement="auto") -> io.NodeOutput:
        path = model_files.path_of(model_name, model_files.TEXT_ENCODER)
        spec = TextEncoderSpec(path=path, dtype=dtype, placement=placement)
        return io.NodeOutput(Handle(spec, parallel or RanksHandle()))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendLoadVAE",
            display_name="Ascend Load VAE",
            category="Ascend",
            description="Picks the Wan VAE that turns latents into frames.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files.names(model_files.VAE),
                    tooltip="A folder of models/diffusers as diffusers or the original write it, or a file of "
                    "models/vae: the Wan 2.1 or the Wan 2.2 VAE.",
                ),
                dtype_input("float32, which the quality of the frames asks for"),
                types.parallel_input(),
            ],
            outputs=[types.Vae.Output(display_name="vae", tooltip="For Ascend VAE Decode.")],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        return model_files.check(model_name, model_files.VAE)

    @classmethod
    def execute(cls, model_name, dtype, parallel=None) -> io.NodeOutput:
        spec = VaeSpec(path=model_files.path_of(model_name, model_files.VAE), dtype=dtype)
        return io.NodeOutput(Handle(spec, parallel or RanksHandle()))


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
