"""How LoRA files name the layers of a HunyuanVideo transformer: as the original (musubi-tuner, diffusion-pipe), as
ComfyUI's network, or as diffusers (PEFT). Layers that are fused in a file change several of the network's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...family import LoraNames
from ...shapes import Shapes
from ...spellings import spellings_of
from .configs import DOUBLE, REFINER, SINGLE
from .names import EXCHANGED, published_name, split_transformer, to_diffusers_name

# The names of layers in files, besides diffusers': outside of blocks, and in each kind of blocks.
OUTSIDE = ["img_in.proj", "vector_in.in_layer", "vector_in.out_layer", "txt_in.input_embedder", "final_layer.linear",
           "final_layer.adaLN_modulation.1", "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2",
           *(f"{part}.{layer}" for part in ("time_in", "guidance_in", "txt_in.t_embedder")
             for layer in ("mlp.0", "mlp.2", "in_layer", "out_layer")),
           "txt_in.c_embedder.in_layer", "txt_in.c_embedder.out_layer"]  # fmt: skip
QK_NORMS = ["norm.query_norm.scale", "norm.key_norm.scale", "norm.query_norm", "norm.key_norm"]  # ComfyUI's
IN_REFINER = ["norm1", "norm2", "self_attn_qkv", "self_attn.qkv", "self_attn_proj", "self_attn.proj", "mlp.fc1",
              "mlp.0", "mlp.fc2", "mlp.2", "adaLN_modulation.1"]  # fmt: skip
IN_DOUBLE = [f"{stream}_{layer}" for stream in ("img", "txt")
             for layer in ("mod.linear", "mod.lin", "attn_qkv", "attn.qkv", "attn_proj", "attn.proj", "attn_q_norm",
                           "attn_k_norm", *(f"attn.{norm}" for norm in QK_NORMS), "mlp.fc1", "mlp.0", "mlp.fc2",
                           "mlp.2")]  # fmt: skip
IN_SINGLE = ["linear1", "linear2", "modulation.linear", "modulation.lin", "q_norm", "k_norm", *QK_NORMS]
LAYERS_IN_BLOCKS = {  # the network's prefix: the files', and the layers in it
    REFINER: ("txt_in.individual_token_refiner.blocks.", IN_REFINER),
    DOUBLE: ("double_blocks.", IN_DOUBLE),
    SINGLE: ("single_blocks.", IN_SINGLE),
}
NUMBERED = {
    REFINER: {f"self_attn_qkv.{i}": f"attn.to_{x}" for i, x in enumerate("qkv")} | {"mlp.fc0": "ff.net.0.proj"},
    DOUBLE: {f"img_attn_qkv.{i}": f"attn.to_{x}" for i, x in enumerate("qkv")}
    | {f"txt_attn_qkv.{i}": f"attn.add_{x}_proj" for i, x in enumerate("qkv")}
    | {"img_mlp.fc0": "ff.net.0.proj", "txt_mlp.fc0": "ff_context.net.0.proj"},
    SINGLE: {f"linear1.{i}": f"attn.to_{x}" for i, x in enumerate("qkv")} | {"linear1.3": "proj_mlp"},
}
GUIDANCE_EMBEDDER = "time_text_embed.guidance_embedder."
FOR_GUIDANCE = "of the guidance embedder, which this model lacks"
FOR_A_BLOCK = "of blocks that this model lacks"
OF_NO_LAYER = "of no layer of this model"
# By the channels that a model reads.
MODELS_BY_CHANNELS = {16: "a model that makes videos from text or by replacing tokens (I2V v2)",
                      33: "an image-to-video model that reads the image's channels (I2V v1)",
                      32: "SkyReels"}  # fmt: skip


def _numbers(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}


def _fused(shapes: Shapes) -> Iterator[str]:
    layers = [EXCHANGED]
    layers += [f"{prefix}{number}.attn.to_qkv" for prefix in (REFINER, DOUBLE) for number in _numbers(shapes, prefix)]
    layers += [f"{DOUBLE}{number}.attn.add_qkv_proj" for number in _numbers(shapes, DOUBLE)]
    layers += [f"{SINGLE}{number}.{layer}" for number in _numbers(shapes, SINGLE) for layer in ("linear1", "proj_out")]
    yield from (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def _guidance_parameters(shapes: Shapes) -> Iterator[str]:
    """The additional parameters of a network that has a guidance embedder."""
    layers = (f"{GUIDANCE_EMBEDDER}{layer}" for layer in ("linear_1", "linear_2"))
    yield from (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def _spellings(known: set[str]) -> dict[str, str]:
    """The network's or a fused layer's name, by all names that it has in files."""
    own = {published_name(name).removesuffix(".weight").removesuffix(".bias") for name in known}
    given = [*OUTSIDE, *(f"{theirs}{number}.{layer}" for prefix, (theirs, layers) in LAYERS_IN_BLOCKS.items()
                         for number in _numbers(known, prefix) for layer in layers)]  # fmt: skip
    return spellings_of(own, given, to_diffusers_name) | _numbered(known)


def _numbered(known: set[str]) -> dict[str, str]:
    """The parts of fused layers as OneTrainer numbers them in the original's names (modules/util/convert/lora)."""
    spelled = {}
    for prefix, parts in NUMBERED.items():
        theirs, _ = LAYERS_IN_BLOCKS[prefix]
        for number in _numbers(known, prefix):
            spelled |= {f"{theirs}{number}.{part}": f"{prefix}{number}.{own}" for part, own in parts.items()}
    return spelled | {name.replace(".", "_"): layer for name, layer in spelled.items()}


def _why_left_out(key: str, layer: str | None) -> str:
    if layer is not None:
        return FOR_GUIDANCE
    return FOR_A_BLOCK if "_blocks" in key else OF_NO_LAYER


def _made_for(misfits: Shapes, shapes: Shapes, reasons: Iterable[str]) -> str:
    first = "x_embedder.proj.weight"
    theirs, ours = misfits.get(first, ()), shapes.get(first, ())
    if len(theirs) == len(ours) > 1 and theirs[1] != ours[1]:
        made, this = (f"{MODELS_BY_CHANNELS.get(channels, 'another kind of model')} ({channels} channels)"
                      for channels in (theirs[1], ours[1]))  # fmt: skip
        return f"It was made for {made}; this is {this}. "
    widths = [(own[0], shapes[name][0]) for name, own in misfits.items()
              if name in shapes and len(own) == 2 and own[0] != shapes[name][0]]  # fmt: skip
    if widths:
        theirs, ours = widths[0]
        return f"It was made for a model with layers of {theirs} outputs; this one's have {ours}. "
    return ""


LORA_NAMES = LoraNames(_spellings, _guidance_parameters, _why_left_out, _made_for, _fused, split_transformer)
