"""How LoRA files name the layers of a Wan transformer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...family import LoraNames
from ...shapes import Shapes
from ...spellings import spellings_of
from .names import to_diffusers_name

# The original's names of layers, and of parameters outside of layers.
_LAYERS = ("q", "k", "v", "o", "norm_q", "norm_k")
ATTENTION_LAYERS = [f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in _LAYERS]
IMAGE_IN_A_BLOCK = [f"cross_attn.{layer}" for layer in ("k_img", "v_img", "norm_k_img")]
OF_MINDSPEED = [f"{kind}_attn.{layer}" for kind in ("self", "cross")
                for layer in ("proj_q", "proj_k", "proj_v", "proj_out", "q_norm", "k_norm")]  # fmt: skip
IN_A_BLOCK = [*ATTENTION_LAYERS, *IMAGE_IN_A_BLOCK, *OF_MINDSPEED, "ffn.0", "ffn.2", "norm3", "modulation"]
IMAGE_LAYERS = [f"img_emb.proj.{number}" for number in (0, 1, 3, 4)]
OUTSIDE = ["patch_embedding", "ref_conv", "text_embedding.0", "text_embedding.2", "time_embedding.0",
           "time_embedding.2", "time_projection.1", "head.head", "head.modulation", "img_emb.emb_pos",
           "text_embedding.linear_1", "text_embedding.linear_2", *IMAGE_LAYERS]  # fmt: skip
FOR_AN_IMAGE = "of layers for CLIP's image, which this model lacks"
FOR_VACE = "of layers of Wan VACE, which this model lacks"
OF_NO_LAYER = "of no layer of this model"
MODELS_BY_WIDTH = {1536: "1.3B", 3072: "5B", 5120: "14B"}  # of the published models
# By the input channels of patch_embedding.
MODELS_BY_CHANNELS = {
    16: "a text-to-video model", 36: "an image-to-video model", 48: "TI2V-5B or a Fun Control model",
    52: "a Fun Control model", 100: "Fun Inpaint of 5B", 148: "Fun Control of 5B",
}  # fmt: skip


def _image_parameters(shapes: Shapes) -> Iterator[str]:
    """The additional parameters of a network with this number of blocks that uses CLIP's image."""
    layers = [*IMAGE_LAYERS, *(f"blocks.{block}.{layer}" for block in _blocks(shapes) for layer in IMAGE_IN_A_BLOCK)]
    for original in ["img_emb.emb_pos", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))]:
        yield to_diffusers_name(original)


def _blocks(names: Iterable[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("blocks.")}


def _spellings(known: set[str]) -> dict[str, str]:
    """diffusers' name of each layer, and of each parameter outside of layers, by all names that it has in files."""
    own = {name.removesuffix(".weight").removesuffix(".bias") for name in known}
    given = [*OUTSIDE, *(f"blocks.{block}.{layer}" for block in _blocks(known) for layer in IN_A_BLOCK)]
    return spellings_of(own, given, to_diffusers_name)


def _why_left_out(key: str, layer: str | None) -> str:
    if layer is not None:
        return FOR_AN_IMAGE
    return FOR_VACE if "vace_" in key else OF_NO_LAYER


def _made_for(misfits: Shapes, shapes: Shapes, reasons: Iterable[str]) -> str:
    wanted = [(own[0], shapes[name][0]) for name, own in misfits.items()
              if name in shapes and len(own) == 2 and len(set(own)) == len(set(shapes[name])) == 1
              and own != shapes[name]]  # fmt: skip
    if wanted:
        theirs, ours = map(_width_text, wanted[0])
        return f"It was made for a model with {theirs}; this one has {ours}. "
    first = "patch_embedding.weight"
    if len(misfits.get(first, ())) == len(shapes.get(first, ())) > 1:
        theirs, ours = (f"{MODELS_BY_CHANNELS.get(channels, 'another kind of model')} ({channels} channels)"
                        for channels in (misfits[first][1], shapes[first][1]))  # fmt: skip
        return f"It was made for {theirs}; this is {ours}. "
    if FOR_AN_IMAGE in reasons:
        return "It was made for an image-to-video model that uses CLIP's image; this one does not. "
    return ""


def _width_text(width: int) -> str:
    return f"{width} channels{f' ({MODELS_BY_WIDTH[width]})' if width in MODELS_BY_WIDTH else ''}"


LORA_NAMES = LoraNames(_spellings, _image_parameters, _why_left_out, _made_for)
