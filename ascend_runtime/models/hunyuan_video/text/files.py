"""Recognises the files of HunyuanVideo's text encoders and vision tower, in every system's layout.

They may be parts of a larger network: a Llama for generating text, with a head; a CLIP with its vision model; or a
LLaVA, which has a vision tower and a Llama.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ....errors import coded_error
from ...shapes import Shapes
from .sizes import LEFT_OUT_LAYERS, ClipTextSizes, LlamaSizes, VisionSizes

LLAMA_SIGNATURE = {
    "layers.0.mlp.gate_proj.weight": 2,
    "layers.0.input_layernorm.weight": 1,
    "layers.0.self_attn.q_proj.weight": 2,
    "layers.0.self_attn.k_proj.weight": 2,
    "embed_tokens.weight": 2,
    "norm.weight": 1,  # not used, but no complete file lacks it
}
CLIP_TEXT_SIGNATURE = {
    "embeddings.token_embedding.weight": 2,
    "final_layer_norm.weight": 1,
    "embeddings.position_embedding.weight": 2,
    "encoder.layers.0.mlp.fc1.weight": 2,
}
VISION_SIGNATURE = {
    "multi_modal_projector.linear_1.weight": 2,
    "multi_modal_projector.linear_2.weight": 2,
    "embeddings.patch_embedding.weight": 4,
    "embeddings.position_embedding.weight": 2,
    "encoder.layers.0.mlp.fc1.weight": 2,
}
# The vision tower's tensors, in files of its own and in those of a LLaVA, by all versions of transformers.
VISION_BEGINS = tuple(
    f"{tower}{model}embeddings.patch_embedding.weight"
    for tower in ("", "vision_tower.", "model.vision_tower.")
    for model in ("", "vision_model.")
)
VISION_PREFIX = re.compile(r"^(model\.)?(vision_tower\.)?(vision_model\.)?")
# Tensors of the larger networks, and of the same one, that are never read.
BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|logit_scale|image_newline)$")
BESIDES_LLAMA = re.compile(r"^(model\.)?(lm_head|language_model\.lm_head|vision_tower|multi_modal_projector)\.")
BESIDES_CLIP = re.compile(r"(^|\.)(text_projection|visual_projection|vision_model)(\.|$)")
BESIDES_VISION = re.compile(
    r"^(model\.)?(language_model|lm_head|visual_projection|text_projection|text_model)\."
)
QWEN, GEMMA = "layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_norm.weight"
CLIP_G_WIDTH = 1280


def vision_name(name: str) -> str:
    """A vision tower's parameter name, without the names of the networks that it is a part of."""
    return VISION_PREFIX.sub("", name)


def is_foreign_to_llama(name: str) -> bool:
    """Whether a tensor is of the head, of a vision tower, or no parameter."""
    return bool(BESIDES_LLAMA.match(name) or BUFFERS.search(name))


def is_unread_in_llama(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a parameter is of the last layers, or of the norm after them."""
    return name.startswith("norm.") or _layer(name, "layers.") in _last(config, LEFT_OUT_LAYERS)


def is_foreign_to_clip(name: str) -> bool:
    return bool(BESIDES_CLIP.search(name) or BUFFERS.search(name))


def is_foreign_to_vision(name: str) -> bool:
    return bool(BESIDES_VISION.match(name) or BUFFERS.search(name))


def is_unread_in_vision(name: str, config: Mapping[str, Any]) -> bool:
    return name.startswith("post_layernorm.") or _layer(name, "encoder.layers.") in _last(config, 1)


def _last(config: Mapping[str, Any], number: int) -> range:
    """The numbers of the last layers."""
    layers = config.get("num_hidden_layers")
    return range(layers - number, layers) if type(layers) is int else range(0)


def _layer(name: str, prefix: str) -> int | None:
    number = name.removeprefix(prefix).split(".")[0]
    return int(number) if name.startswith(prefix) and number.isdecimal() and len(number) < 9 else None


# The configs of the networks, in the config.json of the larger ones


def llama_in(config: Mapping[str, Any]) -> dict:
    return _inner(config, "llava", "text_config", "llama")


def clip_text_in(config: Mapping[str, Any]) -> dict:
    return _inner(config, "clip", "text_config", "clip_text_model")


def vision_in(config: Mapping[str, Any]) -> dict:
    """With the fields of a LLaVA that describe the projector."""
    if config.get("model_type") != "llava":
        return {}
    text = config.get("text_config")
    outer = {key: config[key] for key in config if key.startswith(("vision_feature", "projector", "multimodal"))}
    width = {"text_width": text["hidden_size"]} if isinstance(text, dict) and "hidden_size" in text else {}
    return {**_inner(config, "llava", "vision_config", "clip_vision_model"), **outer, **width}


def _inner(config: Mapping[str, Any], outer: str, field: str, own: str) -> dict:
    """The config of the network `own` in the field of a network `outer`; else the given one, which may be its own."""
    inner = config.get(field, {})
    if config.get("model_type") != outer or not isinstance(inner, dict):
        return dict(config)
    return {"model_type": own, **inner}


def check_with(read: Callable[[Mapping[str, Any]], Any]) -> Callable[[dict, Any], None]:
    """A check of a config by the function that reads the network's sizes from it."""

    def check(config: dict, file: Any) -> None:
        try:
            read(config)
        except ValueError as error:
            raise coded_error("AV-1311", f"{file} describes a network that is not supported: {error}.") from None

    return check


check_llama, check_clip_text, check_vision = map(check_with, (LlamaSizes.of, ClipTextSizes.of, VisionSizes.of))


def other_llama(shapes: Shapes | Iterable[str]) -> str:
    """A sentence about a similar network that is not HunyuanVideo's; else empty."""
    if QWEN in shapes:
        return "It is a Qwen 2.5, as HunyuanVideo 1.5 and others use it; HunyuanVideo needs a Llama 3."
    if GEMMA in shapes:
        return "It is a Gemma or a Qwen 3, which other models use; HunyuanVideo needs a Llama 3."
    return ""


def other_clip(shapes: Shapes | Mapping[str, tuple]) -> str:
    """As `other_llama`, for CLIP's text model."""
    if shapes.get("final_layer_norm.weight") == (CLIP_G_WIDTH,):
        return "It is CLIP-G, as SDXL uses it; HunyuanVideo needs CLIP-L (clip_l.safetensors)."
    return ""
