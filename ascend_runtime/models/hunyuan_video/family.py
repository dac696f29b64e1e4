"""The HunyuanVideo family (1.0): text-to-video, and image-to-video in two forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...specs import Calibration, VaeForm
from ..core_text import CoreEncoder, CoreText
from ..cost import PassSize, SlicedSums, Work
from ..defaults import Defaults
from ..family import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    VAE,
    VISION,
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
from .defaults import DISTILLATIONS, defaults_of, sigmas
from .files import configs, lora_names, names
from .files.downloads import DOWNLOADS
from .files.configs import GUIDING_FRAME
from .files.original import original_shapes
from .files.pipeline import pipeline_of
from .files.published import PUBLISHED_MODELS
from .files.variants import CLASSES, FRAMEPACK, SKYREELS, VAE_CLASSES, VIDEO_15, other_vae, variant
from .latents import CHANNELS, SPATIAL, TEMPORAL, latent_format
from .text import files as text
from .text import sizes
from .text.templates import MAX_PROMPT_TOKENS

PUBLISHED = f"Comfy-Org/HunyuanVideo_repackaged {HUBS}"
PARTS = {
    TRANSFORMER: Part(
        what="HunyuanVideo transformer",
        published=f"hunyuan_video_t2v_720p_bf16.safetensors of {PUBLISHED}",
        class_name=("_class_name", "HunyuanVideoTransformer3DModel"),
        signature=configs.TRANSFORMER_SIGNATURE,
        begins=(f"{configs.REFINER}0.norm1.weight",
                "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
        rename=names.to_diffusers_name,
        config=configs.transformer_config,
        blocks=(configs.DOUBLE, configs.SINGLE),
        other=variant,
        other_classes=CLASSES,
        hidden=configs.HIDDEN,
        split=names.split_transformer,
        published_name=names.published_name,
    ),
    TEXT_ENCODER: Part(
        what="HunyuanVideo Llama text encoder",
        published=f"llava_llama3_fp8_scaled.safetensors of {PUBLISHED}",
        class_name=("model_type", "llama"),
        signature=text.LLAMA_SIGNATURE,
        begins=("layers.0.mlp.gate_proj.weight",),
        rename=names.same,
        config=sizes.llama_config_of,
        other=text.other_llama,
        check=text.check_llama,
        tokenizer_folder="tokenizer",
        brings_tokenizer=False,
        inner_config=text.llama_in,
        foreign=text.is_foreign_to_llama,
        unread=text.is_unread_in_llama,
    ),
    TEXT_ENCODER_2: Part(
        what="CLIP-L text encoder",
        published=f"clip_l.safetensors of {PUBLISHED}",
        class_name=("model_type", "clip_text_model"),
        signature=text.CLIP_TEXT_SIGNATURE,
        begins=("embeddings.token_embedding.weight",),
        rename=names.same,
        config=sizes.clip_text_config_of,
        other=text.other_clip,
        check=text.check_clip_text,
        tokenizer_folder="tokenizer_2",
        brings_tokenizer=False,
        inner_config=text.clip_text_in,
        foreign=text.is_foreign_to_clip,
        published_name="text_model.{}".format,
    ),
    VISION: Part(
        what="LLaVA vision tower",
        published=f"llava_llama3_vision.safetensors of {PUBLISHED}",
        class_name=("model_type", "clip_vision_model"),
        signature=text.VISION_SIGNATURE,
        begins=text.VISION_BEGINS,
        rename=text.vision_name,
        config=sizes.vision_config_of,
        check=text.check_vision,
        inner_config=text.vision_in,
        foreign=text.is_foreign_to_vision,
        unread=text.is_unread_in_vision,
    ),
    VAE: Part(
        what="HunyuanVideo VAE",
        published=f"hunyuan_video_vae_bf16.safetensors of {PUBLISHED}",
        class_name=("_class_name", "AutoencoderKLHunyuanVideo"),
        signature=configs.VAE_SIGNATURE,
        begins=("encoder.conv_in.conv.weight",),
        rename=names.to_vae_name,
        config=configs.vae_config,
        other=other_vae,
        other_classes=VAE_CLASSES,
        check=configs.check_vae_config,
        split=names.split_vae,
    ),
}

# As core ComfyUI's HunyuanImageToVideo names and makes them.
IMAGE_MODELS = "HunyuanVideo's image-to-video models"
IMAGE_FORMS = {
    "v1 (concat)": ImageForm(whole=False, models=IMAGE_MODELS),
    "v2 (replace)": ImageForm(in_latent=True, numbers={GUIDING_FRAME: 0}, models=IMAGE_MODELS),
}


LEFT_OPEN = (
    "text to video, or image to video by token replacement (v2): the two have equal shapes, and no config says which. "
    "A job's conditioning decides: with a first frame (HunyuanImageToVideo, v2) it replaces tokens"
)


# comfy/text_encoders/hunyuan_video.py and comfy/sd1_clip.py of ComfyUI 0.3.75.
CORE_TEXT = CoreText(
    type="hunyuan_video",
    tokenizer="comfy.text_encoders.hunyuan_video:HunyuanVideoTokenizer",
    model="comfy.text_encoders.hunyuan_video:HunyuanVideoClipModel",
    encoders={
        TEXT_ENCODER: CoreEncoder(
            attribute="llama",
            tokenizer="llama",
            prefix="llama.transformer.model.",
            special_tokens={"start": 128000, "pad": 128258},
            reports_mask=True,
            layer=-3,
        ),
        TEXT_ENCODER_2: CoreEncoder(
            attribute="clip_l",
            tokenizer="clip_l",
            prefix="clip_l.transformer.text_model.",
            special_tokens={"start": 49406, "end": 49407, "pad": 49407},
        ),
    },
)


class HunyuanVideo(Family):
    name = "hunyuan_video"
    title = "HunyuanVideo"
    parts = PARTS
    repository = "hunyuanvideo-community/HunyuanVideo"
    schedule = "hunyuan_video"
    presets = calibrations.STEP_CACHE_PRESETS
    core_text = CORE_TEXT
    distillations = DISTILLATIONS
    layout = OriginalLayout(
        models="hunyuan-video-*",
        folders={TRANSFORMER: ("transformers",), TEXT_ENCODER: ("text_encoder_i2v",),
                 VISION: (TEXT_ENCODER, "text_encoder_i2v")},
        files={
            TRANSFORMER: ("mp_rank_00_model_states.pt", "mp_rank_00_model_states_fp8.pt", "pytorch_model_module.pt"),
            VAE: ("pytorch_model.pt",),
        },
        classes={VAE: "AutoencoderKLCausal3D"},
    )
    stock = StockNames(
        names={TRANSFORMER: r"hunyuan_?video|framepack", VAE: r"hunyuan_?video.*vae"},
        others={
            VIDEO_15: r"hunyuan_?video_?1[._]?5", FRAMEPACK: r"framepack", SKYREELS: r"skyreels.*i2v",
            "HunyuanVideo-Avatar or HunyuanCustom": r"avatar|custom",
        },
    )  # fmt: skip
    weights = weights.RULES
    loras = lora_names.LORA_NAMES
    deals_tiles = True

    # Properties of a model, from the configs of its transformers

    def form(self, config: Mapping[str, Any]) -> VaeForm:
        return VaeForm(configs.filled(config)["out_channels"], SPATIAL, TEMPORAL, family=self.name)

    def vae_form(self, config: Mapping[str, Any]) -> VaeForm:
        spatial, temporal = config.get("spatial_compression_ratio", 8), config.get("temporal_compression_ratio", 4)
        return VaeForm(config.get("latent_channels", CHANNELS), spatial, temporal, family=self.name)

    def latent_format(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentFormat:
        return latent_format(config, vae)

    def defaults(self, config: Mapping[str, Any], experts: int) -> Defaults:
        return defaults_of(config)

    def check_transformers(self, configurations: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        configs.check_transformers(configurations, files)

    def vae_for(self, channels: int) -> str:
        return "the HunyuanVideo VAE" if channels == CHANNELS else ""

    def makes_from_text(self, config: Mapping[str, Any]) -> bool:
        return configs.filled(config)["image_condition_type"] is None

    def image_forms(self, form: VaeForm) -> Mapping[str, ImageForm]:
        return IMAGE_FORMS

    def calibration(self, config: Mapping[str, Any], own: Defaults, pixels: int, expert: str) -> Calibration:
        return calibrations.published(own, self.width(config), pixels)

    def left_open(self, config: Mapping[str, Any]) -> str:
        return LEFT_OPEN if configs.is_open(config) else ""

    @property
    def published(self):
        return PUBLISHED_MODELS

    @property
    def downloads(self):
        return DOWNLOADS

    # Cost of a pass

    @property
    def text_tokens(self) -> int:
        return MAX_PROMPT_TOKENS

    def grid(self, config: Mapping[str, Any], size: tuple[int, int, int]) -> tuple[int, int, int]:
        frames, height, width = size
        config = configs.filled(config)
        return frames // config["patch_size_t"], height // config["patch_size"], width // config["patch_size"]

    def width(self, config: Mapping[str, Any]) -> int:
        return configs.width_of(config)

    def text_width(self, config: Mapping[str, Any]) -> int:
        return configs.filled(config)["text_embed_dim"]

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        return configs.filled(config)["pooled_projection_dim"]

    def heads(self, config: Mapping[str, Any]) -> int:
        return configs.filled(config)["num_attention_heads"]

    def smaller(self, config: Mapping[str, Any], heads: int, blocks: int) -> dict[str, Any]:
        """A third of the blocks are double, as in the published model."""
        double = max(1, blocks // 3)
        sizes = {"num_attention_heads": heads, "num_layers": double, "num_single_layers": max(1, blocks - double)}
        config = configs.filled(config)
        return {**config, **sizes, "in_channels": config["out_channels"], "image_condition_type": None}

    def text_in_sequence(self, config: Mapping[str, Any], tokens: int) -> int:
        return tokens

    def work(self, config: Mapping[str, Any], size: PassSize) -> Work:
        return cost.work_of(config, size)

    def sliced_sums(
        self, config: Mapping[str, Any], size: PassSize, video: int, itemsize: int, again: bool = True
    ) -> SlicedSums:
        return cost.sums_of(config, size, video, itemsize)

    # Networks and what they need

    def sigmas(self, steps: int, shift: float, solver: str) -> tuple[float, ...]:
        return sigmas(steps, shift)

    def network(self, part, config, tp=None):
        from . import networks

        return networks.empty(part, config, tp)

    def whole_network(self, part, config):
        from . import networks

        return networks.whole(part, config)

    def vae(self, network, form):
        from .vae.video_vae import HunyuanVae

        return HunyuanVae(network, form)

    def text(self):
        from .text.encoding import HunyuanText

        return HunyuanText()

    def conditioner(self, config, latents):
        from ..shared.conditioning import Reads
        from .conditioning import HunyuanConditioner

        reads = Reads(self.form(config), self.text_width(config), self.pooled_width(config))
        return HunyuanConditioner(config, latents, reads)

    def original_shapes(self, config):
        parameters = self.network(TRANSFORMER, config).named_parameters()
        return original_shapes({name: tuple(parameter.shape) for name, parameter in parameters})

    def pipeline(self, configurations: Mapping[str, Mapping[str, Any]]) -> DiffusersPipeline:
        return pipeline_of(configurations)


FAMILY = HunyuanVideo()
