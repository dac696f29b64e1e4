"""Loaders turn a name and a dtype into a description. The ranks read the weights when a job first needs them."""

from __future__ import annotations

from comfy_api.latest import io

from ..ascend_runtime.specs import (
    DiffusionModelSpec,
    OperatorSpec,
    TextEncoderSpec,
    VaeSpec,
)
from ..ascend_runtime.specs.jobs import ATTENTIONS
from ..ascend_runtime.specs.models import (
    COMPUTE_DTYPES,
    PLACEMENTS,
    QUANTIZATIONS,
    VAE_DTYPES,
    VAE_TILES,
)
from . import model_files, types
from .page.schema import DEVICES, FAMILIES, LOADERS, TASKS, Schema
from .page.validation import refusal
from .types import Handle, ModelHandle, RanksHandle

NO_MODEL = "none"


def dtype_input(automatic: str, dtypes: tuple[str, ...] = COMPUTE_DTYPES) -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=list(dtypes),
        default="auto",
        tooltip=f"The number format for computing. auto: {automatic}.",
    )


class LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        names = model_files.names(model_files.TRANSFORMER)
        return Schema(
            node_id="AscendLoadDiffusionModel",
            display_name="Ascend Load Diffusion Model",
            category=LOADERS,
            search_aliases=[*FAMILIES, *TASKS, *DEVICES, "load model", "unet loader", "checkpoint", "加载模型"],
            advanced=("dtype", "attention", "heads_per_call", "warm_up", "quantization"),
            automatic={"heads_per_call": 0},
            description="Selects the diffusion model, a transformer of Wan or HunyuanVideo. Ascend Sampler runs it on "
            "all ranks.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    tooltip="A folder in models/diffusers, or a file in models/diffusion_models.\n"
                    "Folders: as diffusers, the model's authors, MindSpeed-MM or msModelSlim write them; one folder "
                    "may hold both experts of Wan 2.2.\n"
                    "Files: ComfyUI's .safetensors, also in fp8, the authors' .pth or .pt, or .gguf.\n"
                    "The content decides the format, not the name. embedded/tiny_wan comes with the pack and runs on "
                    "any machine.",
                ),
                dtype_input("float32 on a CPU, bfloat16 on an NPU or GPU"),
                io.Combo.Input(
                    "low_noise_model_name",
                    options=[NO_MODEL, *names],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="The low-noise expert, if the two experts of a model such as Wan 2.2 A14B are two files. "
                    "model_name is then the high-noise expert. none: model_name is the whole model.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default="auto",
                    optional=True,
                    tooltip="How an NPU computes attention. A CPU or GPU always uses torch's own.\n"
                    "auto: as the environment variable ALGO says; without it, infer, or in float32 the best that the "
                    "card has.\n"
                    "fused: CANN's flash attention for training. An A3 uses auto instead.\n"
                    "laser: MindIE SD's laser attention, with products in float16.\n"
                    "infer: CANN's attention for inference.\n"
                    "fastest: MindIE SD tries its kernels on each new shape and keeps the fastest. Videos may differ "
                    "slightly from run to run. An A3 uses auto instead.\n"
                    "fp8: products in 8 bits, an approximation. Only on cards that support it (950 series).\n"
                    "plain: torch's own.",
                ),
                io.Int.Input(
                    "heads_per_call",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="The number of attention heads that an NPU computes at once. Fewer heads use less memory "
                    "and more time. auto (0): all, unless the environment variable USE_SUB_HEAD sets a number.",
                ),
                io.Boolean.Input(
                    "warm_up",
                    default=False,
                    optional=True,
                    tooltip="Runs two steps before the first video of each size and discards them, so that the "
                    "video's own time does not include the compilation of operators. The video stays the same.",
                ),
                types.parallel_input(),
                io.Combo.Input(
                    "quantization",
                    options=list(QUANTIZATIONS),
                    default="none",
                    optional=True,
                    tooltip="Whether linear layers compute in 8 bits: an approximation, which works with LoRAs too.\n"
                    "none: as the files are; they may be quantized already.\n"
                    "w8a8_dynamic: converts the weights to 8-bit integers when they are read, half the size of "
                    "bfloat16. Activations are quantized token by token.",
                ),
            ],
            outputs=[
                types.DiffusionModel.Output(display_name="model", tooltip="For Ascend Sampler or Ascend Load LoRA.")
            ],
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
    """The paths of a transformer, and of the low-noise expert if that has its own file."""
    path = model_files.path_of(model_name, model_files.TRANSFORMER)
    if low_noise_model_name == NO_MODEL:
        return path, None
    return path, model_files.path_of(low_noise_model_name, model_files.TRANSFORMER)


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        names = model_files.names(model_files.TEXT_ENCODER)
        return Schema(
            node_id="AscendLoadTextEncoder",
            display_name="Ascend Load Text Encoder",
            category=LOADERS,
            search_aliases=[*FAMILIES, "umt5 xxl", "t5", "llama", "clip loader", "load clip", "text encoder", "文本编码器"],
            advanced=("dtype", "placement", "vision_model_name"),
            description="Selects the text encoder of the model: UMT5 for Wan, Llama and CLIP-L for HunyuanVideo. It "
            "runs on the CPU of one rank, or on the devices of all ranks.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    tooltip="A folder in models/diffusers, as diffusers or the model's authors write it, or a file in "
                    "models/text_encoders. ComfyUI's file for Wan includes the tokenizer; for HunyuanVideo's files it "
                    "comes with ComfyUI. A .pth file of Wan's authors needs their folder google/umt5-xxl next to it.",
                ),
                dtype_input(
                    "bfloat16. On a CPU without bfloat16 instructions (such as Kunpeng 920), float32 if memory "
                    "suffices; also for an encoder of less than 1 GiB on any CPU"
                ),
                types.parallel_input(),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENTS),
                    default="auto",
                    optional=True,
                    tooltip="Where the encoder runs.\n"
                    "auto: where a prompt is encoded sooner, of the places that have room. On NPUs, ranks only if they "
                    "started for fsdp, or if there is one rank; the environment variable T5_LOAD_CPU can set it (1: "
                    "cpu, 0: ranks).\n"
                    "cpu: on the CPU of one rank. Uses no device memory.\n"
                    "ranks: on the devices of all ranks. Each holds a share of the weights.",
                ),
                io.Combo.Input(
                    "model_name_2",
                    options=[NO_MODEL, *names],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="The second text encoder, if the model has two and each is a file: HunyuanVideo's "
                    "llava_llama3 and clip_l, in either order. none: model_name is a folder with both, or the model "
                    "has only one.",
                ),
                io.Combo.Input(
                    "vision_model_name",
                    options=[NO_MODEL, *model_files.names(model_files.VISION)],
                    default=NO_MODEL,
                    optional=True,
                    tooltip="The vision model that reads the image of Ascend Text Encode, for HunyuanVideo's "
                    "image-to-video models: a file in models/clip_vision (llava_llama3_vision), or a folder in "
                    "models/diffusers. none: the folder of model_name includes it, or no image is used.",
                ),
            ],
            outputs=[types.TextEncoder.Output(display_name="text_encoder", tooltip="For Ascend Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, model_name, model_name_2=NO_MODEL, vision_model_name=NO_MODEL) -> bool | str:
        return refusal(_text_encoders, model_name, model_name_2, vision_model_name)

    @classmethod
    def execute(
        cls, model_name, dtype, parallel=None, placement="auto", model_name_2=NO_MODEL, vision_model_name=NO_MODEL
    ) -> io.NodeOutput:
        path, second, vision = _text_encoders(model_name, model_name_2, vision_model_name)
        tokenizers = {} if second is None else model_files.core_tokenizers()  # ComfyUI's two files have none
        spec = TextEncoderSpec(
            path=path, path_2=second, vision_path=vision, dtype=dtype, placement=placement, **tokenizers
        )
        return io.NodeOutput(Handle(spec, parallel or RanksHandle()))


def _text_encoders(model_name: str, model_name_2: str, vision_model_name: str) -> tuple[str, str | None, str | None]:
    """The paths of a text encoder, of the second one, and of what sees images; None for what is not chosen."""
    further = ((model_name_2, model_files.TEXT_ENCODER), (vision_model_name, model_files.VISION))
    second, vision = (None if name == NO_MODEL else model_files.path_of(name, kind) for name, kind in further)
    return model_files.path_of(model_name, model_files.TEXT_ENCODER), second, vision


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendLoadVAE",
            display_name="Ascend Load VAE",
            category=LOADERS,
            search_aliases=[*FAMILIES, "vae loader", "load vae", "video vae"],
            advanced=("dtype", "tiles"),
            description="Selects the VAE of the model, which turns latents into frames, and frames into latents.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files.names(model_files.VAE),
                    tooltip="A folder in models/diffusers, as diffusers or the model's authors write it, or a file in "
                    "models/vae, such as the VAE of Wan 2.1, of Wan2.2-TI2V-5B or of HunyuanVideo.",
                ),
                dtype_input(
                    "bfloat16 on an NPU, float32 on a CPU or GPU.\n"
                    "float32: convolutions round their inputs to 10 bits of mantissa on an NPU (HF32) or NVIDIA GPU "
                    "(TF32).\n"
                    "float32_strict: without this rounding, which is slower. NPUs of the A2 and A3 series cannot do it",
                    VAE_DTYPES,
                ),
                types.parallel_input(),
                io.Combo.Input(
                    "tiles",
                    options=list(VAE_TILES),
                    default="auto",
                    optional=True,
                    tooltip="How a video is decoded and encoded.\n"
                    "auto: whole if it fits in memory, else published.\n"
                    "whole: in one piece, of which each rank computes a part. No seams.\n"
                    "published: in overlapping tiles that are blended. For HunyuanVideo these are its authors' own, on "
                    "any number of ranks: they need less memory, and up to 2.5 times the work. Wan: only on one rank.",
                ),
            ],
            outputs=[
                types.Vae.Output(
                    display_name="vae", tooltip="For Ascend VAE Decode, Ascend VAE Encode and Ascend Image To Video."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name) -> bool | str:
        return model_files.check(model_name, model_files.VAE)

    @classmethod
    def execute(cls, model_name, dtype, parallel=None, tiles="auto") -> io.NodeOutput:
        spec = VaeSpec(path=model_files.path_of(model_name, model_files.VAE), dtype=dtype, tiles=tiles)
        return io.NodeOutput(Handle(spec, parallel or RanksHandle()))
