"""The Wan family (2.1 and 2.2): text-to-video, image-to-video or both, with one or two experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.faults import shown
from ...errors import coded_error
from ...specs import Calibration, VaeForm
from ..core_text import CoreEncoder, CoreText, OwnTokenizer
from ..cost import PassSize, SlicedSums, Work
from ..defaults import Defaults
from ..family import (
    TEXT_ENCODER,
    TRANSFORMER,
    TRANSFORMER_2,
    VAE,
    DiffusersPipeline,
    Family,
    OriginalLayout,
    Part,
    StockNames,
)
from ..hubs import HUBS
from ..image_forms import ImageForm
from ..latent_format import LatentFormat
from . import calibrations, cost, weights
from .defaults import DISTILLATIONS, defaults_of
from .files import configs, lora_names, names
from .files.downloads import DOWNLOADS
from .files.pipeline import pipeline_of
from .files.published import PUBLISHED_MODELS
from .files.variants import only_blocks, variant
from .latents import CHANNELS, CHANNELS_22, latent_format

VAES = {CHANNELS: "the Wan 2.1 VAE, which Wan2.2-A14B uses too", CHANNELS_22: "the Wan 2.2 VAE of TI2V-5B"}
PARTS = {
    TRANSFORMER: Part(
        what="Wan transformer",
        published=f"the shards of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        class_name=("_class_name", "WanTransformer3DModel"),
        signature=configs.TRANSFORMER_SIGNATURE,
        begins=("patch_embedding.weight",),
        rename=names.to_diffusers_name,
        config=configs.transformer_config,
        other=variant,
        incomplete=only_blocks,
        hidden={"attention_head_dim": configs.HEAD_DIM},
    ),
    TEXT_ENCODER: Part(
        what="UMT5 text encoder",
        published=f"models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        class_name=("model_type", "umt5"),
        signature=configs.TEXT_ENCODER_SIGNATURE,
        begins=("encoder.block.0.layer.0.SelfAttention.q.weight", "blocks.0.attn.q.weight"),
        rename=names.to_umt5_name,
        config=configs.text_encoder_config,
        other=configs.other_text_encoder,
        tokenizer_folder="google/umt5-xxl",
    ),
    VAE: Part(
        what="Wan VAE",
        published=f"Wan2.1_VAE.pth of Wan-AI/Wan2.2-T2V-A14B, or Wan2.2_VAE.pth of Wan2.2-TI2V-5B, {HUBS}",
        class_name=("_class_name", "AutoencoderKLWan"),
        signature=configs.VAE_SIGNATURE,
        begins=("encoder.conv_in.weight", "encoder.conv1.weight"),
        rename=names.to_vae_name,
        config=configs.vae_config,
        check=configs.check_vae_config,
    ),
}
# comfy/text_encoders/wan.py of ComfyUI 0.3.75.
CORE_TEXT = CoreText(
    type="wan",
    tokenizer="comfy.text_encoders.wan:WanT5Tokenizer",
    model="comfy.text_encoders.wan:WanT5Model",
    encoders={
        TEXT_ENCODER: CoreEncoder(
            attribute="umt5xxl",
            tokenizer="clip_umt5xxl",
            prefix="umt5xxl.transformer.",
            special_tokens={"end": 1, "pad": 0},
        )
    },
    attributes={"clip_name": "umt5xxl", "clip": "umt5xxl"},
    own_tokenizer=OwnTokenizer(
        part=TEXT_ENCODER,
        data="spiece_model",
        replaced="clip_umt5xxl_tokenizer_class",
        settings={
            "embedding_size": 4096, "embedding_key": "umt5xxl", "has_start_token": False, "pad_with_end": False,
            "pad_to_max_length": False, "max_length": 99999999, "min_length": 512, "pad_token": 0,
        },  # fmt: skip
    ),
)


class Wan(Family):
    name = "wan"
    title = "Wan"
    parts = PARTS
    repository = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    schedule = "wan"
    layout = OriginalLayout(
        folders={TRANSFORMER: ("high_noise_model",), TRANSFORMER_2: ("low_noise_model",)},
        loose="*.pth",
        classes={TRANSFORMER: "WanModel"},
    )
    stock = StockNames(
        names={TRANSFORMER: r"wan(?![a-z])|wan_?video", VAE: r"wan.*vae|vae.*wan"},
        others={
            "Wan VACE": r"vace", "Wan Fun Control with a camera": r"fun.*camera", "Wan Animate": r"animate",
            "Wan S2V (sound to video)": r"s2v", "an audio-driven model": r"humo|infinitetalk|multitalk|fantasytalk",
            "SkyReels diffusion forcing": r"skyreels.*df", "ReCamMaster": r"recammaster", "SCAIL": r"scail",
            "a tiny VAE": r"^(light)?tae",
        },
    )  # fmt: skip
    weights = weights.RULES
    loras = lora_names.LORA_NAMES
    to_mindspeed = staticmethod(names.to_mindspeed_name)
    mask_channels = frozenset({1, configs.MASK_CHANNELS})
    core_text = CORE_TEXT
    distillations = DISTILLATIONS

    # Properties of a model, from the configs of its transformers

    def form(self, config: Mapping[str, Any]) -> VaeForm:
        channels = configs.filled(config)["out_channels"]
        return VaeForm(channels, spatial=16 if channels == CHANNELS_22 else 8, temporal=4, family=self.name)

    def vae_form(self, config: Mapping[str, Any]) -> VaeForm:
        spatial, temporal = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
        return VaeForm(config.get("z_dim", 16), spatial, temporal, family=self.name)

    def latent_format(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentFormat:
        return latent_format(config, vae)

    def defaults(self, config: Mapping[str, Any], experts: int) -> Defaults:
        return defaults_of(config, experts)

    def check_transformers(self, configurations: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        configs.check_transformers(configurations, files)

    def with_original_config(self, config: dict, original: Mapping[str, Any], file: Path) -> dict:
        """Adds the number of heads."""
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        number = original.get("num_heads", heads)
        if type(number) is not int or number < 1 or heads * width % number:
            raise coded_error(
                "AV-1309",
                f"{file} says num_heads {shown(repr(number))}, which does not divide the {heads * width} channels of "
                "its weights. Download it again.",
            )
        return config | {"num_attention_heads": number, "attention_head_dim": heads * width // number}

    def vae_for(self, channels: int) -> str:
        return VAES.get(channels, "")

    def makes_from_text(self, config: Mapping[str, Any]) -> bool:
        config = configs.filled(config)
        return config["in_channels"] == config["out_channels"]

    def image_forms(self, form: VaeForm) -> Mapping[str, ImageForm]:
        if form.channels == CHANNELS_22:
            return {"": ImageForm(in_latent=True, models="Models with this VAE, such as Wan2.2-TI2V-5B,")}
        extra = ImageForm(takes_more=True)
        return {"": extra}

    def calibration(self, config: Mapping[str, Any], own: Defaults, pixels: int, expert: str) -> Calibration:
        return calibrations.published(own, self.width(config), pixels, expert)

    @property
    def published(self):
        return PUBLISHED_MODELS

    @property
    def downloads(self):
        return DOWNLOADS

    # Cost of a pass

    def per_token(self, config: Mapping[str, Any]) -> bool:
        return configs.filled(config)["out_channels"] == CHANNELS_22

    def grid(self, config: Mapping[str, Any], size: tuple[int, int, int]) -> tuple[int, int, int]:
        frames, height, width = (length // patch for length, patch in zip(size, configs.filled(config)["patch_size"]))
        return frames, height, width

    def width(self, config: Mapping[str, Any]) -> int:
        return cost.width_of(config)

    def heads(self, config: Mapping[str, Any]) -> int:
        return configs.filled(config)["num_attention_heads"]

    def smaller(self, config: Mapping[str, Any], heads: int, blocks: int) -> dict[str, Any]:
        config = configs.filled(config)
        config.pop(configs.REFERENCE_CHANNELS, None)
        inner = heads * 8 * max(1, config["ffn_dim"] // config["num_attention_heads"] // 8)  # divisible as heads are
        sizes = {"num_attention_heads": heads, "ffn_dim": inner, "num_layers": blocks}
        return {**config, **sizes, **configs.FROM_TEXT, "in_channels": config["out_channels"]}

    def text_width(self, config: Mapping[str, Any]) -> int:
        return configs.filled(config)["text_dim"]

    def work(self, config: Mapping[str, Any], size: PassSize) -> Work:
        return cost.work_of(config, size)

    def sliced_sums(
        self, config: Mapping[str, Any], size: PassSize, video: int, itemsize: int, again: bool = True
    ) -> SlicedSums:
        return cost.sums_of(config, size, itemsize, again)

    # Networks and what they need

    def network(self, part, config, tp=None):
        from . import networks

        return networks.empty(part, config, tp)

    def vae(self, network, form):
        from .vae.video_vae import WanVae

        return WanVae(network, form)

    def text(self):
        from .text import WanText

        return WanText()

    def conditioner(self, config, latents):
        from ..shared.conditioning import Reads
        from .conditioning import WanConditioner

        return WanConditioner(config, latents, Reads(self.form(config), self.text_width(config)))

    def original_shapes(self, config):
        parameters = self.network(TRANSFORMER, config).named_parameters()
        return {names.to_original_name(name): tuple(parameter.shape) for name, parameter in parameters}

    def empty_latent(self, shape):
        from .conditioning import empty_latent

        return empty_latent(shape)

    def pipeline(self, configurations: Mapping[str, Mapping[str, Any]]) -> DiffusersPipeline:
        return pipeline_of(configurations)


FAMILY = Wan()
