"""Core ComfyUI's CLIP whose work the ranks do, and its loaders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.sd1_clip import SDTokenizer
from comfy_api.latest import io

from ...ascend_runtime.models.core_text import CoreText, OwnTokenizer
from ...ascend_runtime.models.family import Family
from ...ascend_runtime.models.registry import families
from ...ascend_runtime.models.registry import family as family_named
from ...ascend_runtime.models.shared.tokenizers import JsonTokenizer
from ...ascend_runtime.specs import TextEncoderSpec
from .. import comfy_bridge, model_files, types
from ..page.schema import FAMILIES, LOADERS, Schema
from ..page.validation import refusal
from ..types import Handle, RanksHandle
from .core_options import dtype_for, options_of, with_further
from .remote import CPU
from .text_model import RemoteTextPatcher, imported, saved, text_model


def ranks_clip(handle: Handle, family: Family) -> comfy.sd.CLIP:
    """A CLIP of core's own class. Raises ValueError for the text encoders of another family."""
    described = comfy_bridge.text_encoders(handle)
    facts, core = described.info["encoders"], family.core_text
    if facts["family"] != family.name:
        other = family_named(facts["family"])
        fitting = f"type {other.core_text.type}" if other.core_text else "Ascend Load Text Encoder"
        raise ValueError(
            f"type is {core.type}, but {handle.spec.path} is the text encoder of {other.title} models. Use {fitting}."
        )
    model = text_model(handle, core, facts["shapes"])
    clip = comfy.sd.CLIP(
        SimpleNamespace(params={}, clip=lambda **_: model, tokenizer=imported(core.tokenizer)),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=_tokenizer_data(core, described.tensor, facts),
        model_options={"load_device": CPU, "offload_device": CPU, "initial_device": torch.device("meta")},
    )
    patcher = RemoteTextPatcher.of(model)
    patcher.is_clip, patcher.hook_mode = True, clip.patcher.hook_mode
    clip.patcher = patcher
    # Core asks these two of an object's own: a tokenizer has no other part in saving, or in finding embeddings.
    clip.tokenizer.state_dict = _refuse_to_save
    for encoder in core.encoders.values():
        getattr(clip.tokenizer, encoder.tokenizer)._try_get_embedding = _refuse_embedding
    return clip


def _refuse_to_save():
    raise saved()


def _refuse_embedding(name: str):
    raise ValueError(
        f"The prompt has 'embedding:{name}', and text encoders on the ranks read no embeddings of textual inversion. "
        "Remove these words from the prompt."
    )


def _tokenizer_data(core: CoreText, content: torch.Tensor | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What core's tokenizer takes from the encoder's file."""
    own = core.own_tokenizer
    if own is None:
        return {}
    if facts["sentencepiece"]:
        return {own.data: content.numpy().tobytes()}
    return {own.replaced: partial(_json_tokenizer, own, content.numpy().tobytes())}


class Pieces:
    """A tokenizer.json with what core's SDTokenizer asks of a tokenizer."""

    def __init__(self, content: bytes):
        self._tokenizer = JsonTokenizer(content, Path("tokenizer.json"))

    @classmethod
    def from_pretrained(cls, content: bytes) -> Pieces:
        return cls(content)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer(text, truncation=False).input_ids[0].tolist()}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.vocabulary


def _json_tokenizer(own: OwnTokenizer, content: bytes, embedding_directory=None, tokenizer_data=None) -> SDTokenizer:
    return SDTokenizer(content, tokenizer_class=Pieces, embedding_directory=embedding_directory, **own.settings)


def _family(type: str) -> Family:
    """The family of a type of core's loaders. Raises ValueError for types of other models."""
    known = {one.core_text.type: one for one in families().values() if one.core_text is not None}
    if type not in known:
        raise ValueError(
            f"type is {type}; the ranks run the text encoders of {', '.join(known)}. For another model, use core's own "
            "loader."
        )
    return known[type]


def _loaded(names: tuple[str, ...], type: str, device: str, parallel: RanksHandle | None) -> io.NodeOutput:
    family = _family(type)
    paths = [model_files.path_of(name, model_files.TEXT_ENCODER) for name in names]
    return io.NodeOutput(clip_of(paths, family, "cpu" if device == "cpu" else "auto", parallel or RanksHandle()))


def clip_of(paths: list[str], family: Family, placement: str, ranks: RanksHandle) -> comfy.sd.CLIP:
    """A CLIP of the text encoders in one or two files. Raises ValueError if they hold others, or none."""
    path, *second = paths
    tokenizers = model_files.core_tokenizers() if family.core_text.own_tokenizer is None else {}
    spec = TextEncoderSpec(
        path=path,
        path_2=second[0] if second else None,
        dtype=dtype_for("text_enc"),
        placement=placement,
        **tokenizers,
    )
    return ranks_clip(Handle(spec, ranks), family)


def _checked(type: str, *names: str) -> None:
    """Raises ValueError for a type or a name that the ranks cannot load."""
    _family(type)
    for name in names:
        model_files.path_of(name, model_files.TEXT_ENCODER)


DEVICE = partial(
    io.Combo.Input,
    "device",
    options=["default", "cpu"],
    default="default",
    optional=True,
    tooltip="Where the encoder runs.\n"
    "default: on the CPU of one rank, with all its cores. On NPUs, the environment variable T5_LOAD_CPU=0 moves it to "
    "the devices of all ranks, each with a share of the weights.\n"
    "cpu: on the CPU of one rank.",
)
CLIP_OUTPUT = partial(
    io.Clip.Output, display_name="CLIP", tooltip="For core's CLIP Text Encode, and all other nodes that take a CLIP."
)


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        listed = with_further(model_files.names(model_files.TEXT_ENCODER), options_of("CLIPLoader", "clip_name"))
        known = [one.core_text.type for one in families().values() if one.core_text is not None]
        return Schema(
            node_id="AscendCLIPLoader",
            display_name="Ascend Load CLIP (Core)",
            category=LOADERS,
            search_aliases=[*FAMILIES, "clip loader", "load clip", "umt5 xxl", "t5", "text encoder", "文本编码器"],
            description="Loads the text encoder of Wan, or a folder with those of HunyuanVideo, as core's Load CLIP "
            "does, for core's nodes and those of other packs.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=listed,
                    tooltip="A file in models/text_encoders, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors, or a "
                    "folder in models/diffusers.",
                ),
                io.Combo.Input(
                    "type",
                    options=with_further(known, options_of("CLIPLoader", "type")),
                    tooltip="Whose text encoder it is: wan or hunyuan_video. The other types need core's Load CLIP.",
                ),
                DEVICE(),
                types.parallel_input(),
            ],
            outputs=[CLIP_OUTPUT()],
        )

    @classmethod
    def validate_inputs(cls, clip_name, type) -> bool | str:
        return refusal(_checked, type, clip_name)

    @classmethod
    def execute(cls, clip_name, type, device="default", parallel=None) -> io.NodeOutput:
        return _loaded((clip_name,), type, device, parallel)


class DualCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        listed = with_further(model_files.names(model_files.TEXT_ENCODER), options_of("DualCLIPLoader", "clip_name1"))
        known = [one.core_text.type for one in families().values() if one.core_text and len(one.text_parts) > 1]
        name = "A file in models/text_encoders: llava_llama3 or clip_l. Their order does not matter."
        return Schema(
            node_id="AscendDualCLIPLoader",
            display_name="Ascend Load Dual CLIP (Core)",
            category=LOADERS,
            search_aliases=[*FAMILIES, "dual clip loader", "llama", "clip l", "text encoder", "文本编码器"],
            description="Loads the two text encoders of HunyuanVideo as core's DualCLIPLoader does, for core's nodes "
            "and those of other packs.",
            inputs=[
                io.Combo.Input("clip_name1", options=listed, tooltip=name),
                io.Combo.Input("clip_name2", options=listed, tooltip="The other of the two."),
                io.Combo.Input(
                    "type",
                    options=with_further(known, options_of("DualCLIPLoader", "type")),
                    tooltip="Whose text encoders they are: hunyuan_video. The other types need core's DualCLIPLoader.",
                ),
                DEVICE(),
                types.parallel_input(),
            ],
            outputs=[CLIP_OUTPUT()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1, clip_name2, type) -> bool | str:
        return refusal(_checked, type, clip_name1, clip_name2)

    @classmethod
    def execute(cls, clip_name1, clip_name2, type, device="default", parallel=None) -> io.NodeOutput:
        return _loaded((clip_name1, clip_name2), type, device, parallel)
