"""The text encoder and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import devices
from ..checkpoints.bounded import read_bounded
from ..checkpoints.faults import usable
from ..checkpoints.layout import Component, find_text_encoder
from ..checkpoints.reader import Progress, check_weights, load_weights, nbytes, tokenizer_model
from ..checkpoints.tokenizers import INSTEAD, JSON, LONGEST_SPIECE, SPIECE, check_class, check_spiece, tokenizer_json
from ..parallel.fsdp import Share, Sharding
from ..specs import TextEncoderSpec
from ..text import JsonTokenizer, SentencePiece
from .networks import dtype_named, empty_network

SMALL = 2**30  # bytes on disk; on a CPU a text encoder below this is computed in fp32, a larger one in bfloat16


@dataclass
class TextEncoder:
    model: torch.nn.Module
    tokenizer: Any


def files(spec: TextEncoderSpec) -> list[Component]:
    return [find_text_encoder(spec.path)]


def load(spec: TextEncoderSpec, found: list[Component], device, progress: Progress, sharding: Sharding) -> TextEncoder:
    """On this rank's device, whole or a share, where its placement is ranks; else whole on the CPU."""
    component = found[0]
    tokenizer = find_tokenizer(component)  # before the weights are read, as it can be missing
    device = device if spec.placement == "ranks" else torch.device("cpu")
    dtype = dtype_named(spec.dtype, _text_dtype(device, component.nbytes))
    model = empty_network("text_encoder", component)
    check_size(tokenizer, model, component)
    places = check_weights(model, component.shards, component.rename, split=component.split)
    progress.expect(nbytes(places))
    load_weights(
        model,
        places,
        dtype_of=lambda name: dtype,
        device=device,
        share=Share(sharding, lambda name: None, lambda name: False, [model.shared, *model.encoder.block]),
        on_bytes=progress.add,
    )
    return TextEncoder(model.eval(), tokenizer)


def find_tokenizer(component: Component) -> Any:
    """The tokenizer of a text encoder: a folder's, or the one that its file brings along."""
    found = component.tokenizer
    if found is None:
        raise ValueError(
            f"{component.shards[0]} has no tokenizer in it, and none lies beside it. Put the folder google/umt5-xxl of "
            "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) beside the file, or take ComfyUI's "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged), which has one."
        )
    if found.is_file():
        model = tokenizer_model(found)
        with usable(found, "its tokenizer"):
            check_spiece(model)
            return SentencePiece(model)
    if not found.is_dir():
        raise ValueError(f"{found} does not exist; the text encoder needs the tokenizer folder beside it.")
    check_class(found)
    if (found / JSON).is_file():
        return JsonTokenizer(tokenizer_json(found / JSON), found)
    if (found / SPIECE).is_file():
        with usable(found / SPIECE, "the tokenizer in it"):
            model = read_bounded(found / SPIECE, LONGEST_SPIECE)
            check_spiece(model)
            return SentencePiece(model)
    raise ValueError(
        f"{found} has neither {JSON} nor {SPIECE}, of which a T5 tokenizer needs one. Download google/umt5-xxl of "
        "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) into it."
    )


def check_size(tokenizer: Any, model: torch.nn.Module, component: Component) -> None:
    """Raises ValueError for a tokenizer with more pieces than the text encoder has embeddings."""
    known = model.shared.num_embeddings
    if tokenizer.size > known:
        raise ValueError(
            f"{component.tokenizer} has {tokenizer.size} pieces, but the text encoder {component.shards[0]} knows "
            f"{known}: it is another model's tokenizer. {INSTEAD}"
        )


def _text_dtype(device: torch.device, nbytes: int) -> torch.dtype:
    """What an encoder of this size on disk computes in, where it is not told."""
    if device.type == "cpu":
        return torch.float32 if nbytes < SMALL else torch.bfloat16
    dtype = devices.default_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype  # T5's feed-forward overflows in float16
