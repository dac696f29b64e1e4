"""The sizes of the text encoders and of the vision tower, from their configs or from the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....checkpoints.configs import is_finite_number
from ....checkpoints.faults import shown
from ...shapes import Shapes

LEFT_OUT_LAYERS = 2  # of the Llama's last layers, as the hidden state before them is read
SEEN_LAYER = -2  # of the vision tower's hidden states, the one that is read: its last layer is left out
LLAMA_HEAD_DIM, CLIP_HEAD_DIM = 128, 64  # of the published networks
LLAMA_THETA, LLAMA_EPS, CLIP_EPS = 500_000.0, 1e-5, 1e-5
MAX_LAYERS, MAX_WIDTH = 256, 2**20
ACTIVATIONS = ("quick_gelu", "gelu")

# transformers' defaults for omitted fields of LlamaConfig, CLIPTextConfig and CLIPVisionConfig.
LLAMA_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "rms_norm_eps": 1e-6}  # fmt: skip
CLIP_TEXT_DEFAULTS = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                      "num_attention_heads": 8, "max_position_embeddings": 77}  # fmt: skip
# LLaVA's own defaults for its vision tower differ from CLIPVisionConfig's.
VISION_DEFAULTS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                   "image_size": 336, "patch_size": 14}  # fmt: skip


@dataclass(frozen=True)
class LlamaSizes:
    """layers: of the network in the files. theta: the base of the rotary frequencies."""

    vocabulary: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    theta: float
    eps: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaSizes:
        """Raises ValueError for a config of which this Llama is not a network."""
        config = {**LLAMA_DEFAULTS, **config}
        _require(config, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
        heads, width = _count(config, "num_attention_heads", MAX_LAYERS), _count(config, "hidden_size")
        key_heads = _count({"num_key_value_heads": heads, **_given(config)}, "num_key_value_heads", MAX_LAYERS)
        if heads % key_heads:
            raise ValueError(f"{heads} heads cannot share {key_heads} heads of keys and values")
        layers = _count(config, "num_hidden_layers", MAX_LAYERS)
        if layers <= LEFT_OUT_LAYERS:
            raise ValueError(f"it has {layers} layers; the last {LEFT_OUT_LAYERS} are not used, so it needs more")
        head_dim = _count({"head_dim": max(1, width // heads), **_given(config)}, "head_dim")
        return cls(_count(config, "vocab_size"), width, _count(config, "intermediate_size"), layers, heads, key_heads,
                   head_dim, _theta(config), _number(config, "rms_norm_eps"))  # fmt: skip


@dataclass(frozen=True)
class ClipSizes:
    """layers: of the network in the files. tokens: of its position embeddings."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    activation: str
    eps: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ClipSizes:
        """Raises ValueError for a config of which this CLIP is not a network."""
        config = {"layer_norm_eps": CLIP_EPS, "hidden_act": ACTIVATIONS[0], **_given(config)}
        _require(config, hidden_act=ACTIVATIONS)
        width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads", MAX_LAYERS)
        if width % heads:
            raise ValueError(f"{width} channels cannot be divided among {heads} heads")
        return cls(width, _count(config, "intermediate_size"), _count(config, "num_hidden_layers", MAX_LAYERS), heads,
                   config["hidden_act"], _number(config, "layer_norm_eps"))  # fmt: skip


@dataclass(frozen=True)
class ClipTextSizes:
    """positions: the longest text in tokens."""

    vocabulary: int
    positions: int
    stack: ClipSizes

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ClipTextSizes:
        config = {**CLIP_TEXT_DEFAULTS, **_given(config)}
        return cls(_count(config, "vocab_size"), _count(config, "max_position_embeddings"), ClipSizes.of(config))


@dataclass(frozen=True)
class VisionSizes:
    """side, patch: of the image and of its patches, in pixels. width: of the tokens that the Llama reads."""

    side: int
    patch: int
    width: int
    stack: ClipSizes

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VisionSizes:
        """Raises ValueError for a config of another vision tower or another projector than LLaVA's."""
        config = {**VISION_DEFAULTS, "text_width": LLAMA_DEFAULTS["hidden_size"], **_given(config)}
        _require(config, num_channels=(3,), vision_feature_layer=(SEEN_LAYER,), projector_hidden_act=("gelu",),
                 vision_feature_select_strategy=("default",), multimodal_projector_bias=(True,))  # fmt: skip
        side, patch = _count(config, "image_size"), _count(config, "patch_size")
        if side % patch:
            raise ValueError(f"images of {side} pixels cannot be divided into patches of {patch}")
        stack = ClipSizes.of(config)
        if stack.layers < 2:
            raise ValueError("it has 1 layer; the last one is not used, so it needs more")
        return cls(side, patch, _count(config, "text_width"), stack)

    @property
    def tokens(self) -> int:
        """The number of tokens of an image."""
        return (self.side // self.patch) ** 2


# The configs, as transformers writes them, of networks whose files have no config


def llama_config_of(shapes: Shapes) -> dict:
    vocabulary, width = shapes["embed_tokens.weight"]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": _layers(shapes, "layers."),
        "num_attention_heads": max(1, shapes["layers.0.self_attn.q_proj.weight"][0] // LLAMA_HEAD_DIM),
        "num_key_value_heads": max(1, shapes["layers.0.self_attn.k_proj.weight"][0] // LLAMA_HEAD_DIM),
        "head_dim": LLAMA_HEAD_DIM,
        "rope_theta": LLAMA_THETA,
        "rms_norm_eps": LLAMA_EPS,
    }


def clip_text_config_of(shapes: Shapes) -> dict:
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    positions = shapes["embeddings.position_embedding.weight"][0]
    return {"model_type": "clip_text_model", "vocab_size": vocabulary, "max_position_embeddings": positions,
            **_stack_config(shapes, width)}  # fmt: skip


def vision_config_of(shapes: Shapes) -> dict:
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    side = round((shapes["embeddings.position_embedding.weight"][0] - 1) ** 0.5) * patch
    return {"model_type": "clip_vision_model", "image_size": side, "patch_size": patch,
            "text_width": shapes["multi_modal_projector.linear_2.weight"][0],
            **_stack_config(shapes, width)}  # fmt: skip


def _stack_config(shapes: Shapes, width: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _layers(shapes, "encoder.layers."),
        "num_attention_heads": max(1, width // CLIP_HEAD_DIM),
    }


def _layers(shapes: Shapes, prefix: str) -> int:
    """The number of layers by the highest number; `check_weights` lists the tensors of missing ones."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)


# Fields


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in config.items() if value is not None}


def _require(config: Mapping[str, Any], **wanted: tuple) -> None:
    """Raises ValueError if a field is given with another value."""
    for name, values in wanted.items():
        if config.get(name, values[0]) not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(f"{name} is {shown(repr(config[name]))}; only {supported} is supported")


def _count(config: Mapping[str, Any], name: str, most: int = MAX_WIDTH) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{name} is {shown(repr(value))}; it must be an integer from 1 to {most}")
    return value


def _number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} is {shown(repr(value))}; it must be a number above 0")
    return float(value)


def _theta(config: Mapping[str, Any]) -> float:
    """From `rope_theta`, or as transformers 5 writes it. Raises ValueError for scaled frequencies (Llama 3.1)."""
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{field} is {shown(repr(rope))}; it must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{field} has the type {shown(repr(kind))}, as Llama 3.1; only 'default' is supported")
    held = {"rope_theta": 10_000.0, **_given(config.get("rope_parameters") or {}), **_given(config)}
    return _number(held, "rope_theta")
