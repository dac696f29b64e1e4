"""Core's model of text encoders whose work the ranks do: what stands behind core's CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral
from typing import Any

import torch
from comfy.sd1_clip import ClipTokenWeightEncoder
from torch import Tensor

from ...ascend_runtime.models.core_text import CoreEncoder, CoreText
from .. import comfy_bridge
from ..types import Handle
from .remote import RemotePatcher, RemoteWeights, in_ranks

WHAT = "The CLIP of Ascend Load CLIP (Core)"


@dataclass(frozen=True)
class Encoding:
    """Of one text. text [1,S,D]; pooled [1,D]; mask [1,S]: 0 for padding."""

    text: Tensor
    pooled: Tensor | None
    mask: Tensor


class RemoteEncoder(RemoteWeights, ClipTokenWeightEncoder):
    """One text encoder, as core's classes use it: they split texts, weight tokens and pad; the ranks encode tokens."""

    def __init__(self, handle: Handle, part: str, core: CoreEncoder):
        super().__init__(WHAT)
        self.handle, self.part, self.core = handle, part, core
        self.special_tokens = dict(core.special_tokens)

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for another layer than core's own, which only CLIP Set Last Layer asks for."""
        layer, own = options.get("layer"), self.core.layer
        pooled_only = "pad" in self.special_tokens and self.special_tokens["pad"] == self.special_tokens.get("end")
        if layer is not None and layer != (own or -1) and not pooled_only:
            raise ValueError(
                f"CLIP Set Last Layer asks for layer {layer}, and the ranks compute the text encoder as the video "
                f"model was trained with it, to layer {own or -1}. Remove CLIP Set Last Layer."
            )

    def reset_clip_options(self) -> None:
        """Nothing was changed."""

    def encode(self, texts: list[list]) -> tuple:
        """Texts of equally many tokens, each a number or an embedding, as core's SDClipModel encodes them: the
        embeddings [texts,S,D], the pooled vectors [texts,D] or None, and, where core reports it, the mask [texts,S]."""
        made = [self._encoded(text) for text in texts]
        lengths = {one.text.shape[1] for one in made}
        if len(lengths) > 1:
            raise ValueError(
                "A weight such as (word:1.2) cannot be used in a prompt with an image: core compares each token with "
                "an empty prompt, which has no image. Remove the weights."
            )
        text, mask = (torch.cat([getattr(one, name) for one in made]) for name in ("text", "mask"))
        pooled = None if made[0].pooled is None else torch.cat([one.pooled for one in made])
        return (text, pooled, {"attention_mask": mask}) if self.core.reports_mask else (text, pooled)

    def _encoded(self, text: list) -> Encoding:
        embeddings = {at: _embedding(one) for at, one in enumerate(text) if not isinstance(one, Integral)}
        ids = torch.tensor([0 if at in embeddings else int(one) for at, one in enumerate(text)])
        length = self._length(ids, embeddings)
        handle, part = self.handle, self.part
        result = comfy_bridge.run_job(
            handle.ranks,
            lambda runtime, hooks: runtime.encode_tokens(handle.spec, part, ids, length, embeddings, **hooks),
        )
        seen = length + result.tensor.shape[1] - len(ids)  # an image has several tokens in the place of one
        mask = (torch.arange(result.tensor.shape[1]) < seen).long()[None]
        return Encoding(result.tensor, result.tensors.get("pooled"), mask)

    def _length(self, ids: Tensor, embeddings: Mapping[int, Tensor]) -> int:
        """The number of tokens up to and with the first end token, or, without one, before the first padding."""
        end = self.special_tokens.get("end")
        ends = (ids == (self.special_tokens["pad"] if end is None else end)).nonzero().flatten().tolist()
        first = next((at for at in ends if at not in embeddings), None)
        return len(ids) if first is None else max(1, first + (end is not None))


def _embedding(given: Any) -> Tensor:
    """The embeddings [n,D] of an image in the place of a token, as core's tokenizers make it."""
    if isinstance(given, Mapping) and given.get("type") == "embedding" and given.get("original_type") == "image":
        return given["data"].flatten(0, -2).float().cpu()
    raise ValueError(
        f"{WHAT} reads text, and images of a vision model, but no other embeddings in the place of tokens "
        f"({type(given).__name__}). Remove the node or the words in the prompt that add them."
    )


class RemoteTextModel(RemoteWeights):
    """What core's classes of text models have besides the encoders; see `text_model`."""

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """The names of the weights, for core's loaders of LoRAs; the weights are in the ranks."""
        return dict(self.names)


class RemoteTextPatcher(RemotePatcher):
    """Refuses LoRAs in text encoders."""

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return self._refused(patches, strength_patch, strength_model)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        return self._refused(patches, strength_patch, strength_model)

    def _refused(self, patches, strength_patch: float, strength_model: float) -> list:
        """The names of patches of the text encoders that change nothing. Raises ValueError if they would."""
        known = self.model.state_dict()
        own = [key for key in patches if (key if isinstance(key, str) else key[0]) in known]
        if own and (strength_patch != 0 or strength_model != 1):
            raise ValueError(
                f"{len(own)} patches, such as {own[0]}, would change the text encoder, whose weights are in the ranks. "
                "Set strength_clip to 0, or connect core's own loader of the text encoder."
            )
        return own


def text_model(handle: Handle, core: CoreText, shapes: Mapping[str, Mapping[str, list[int]]]) -> RemoteTextModel:
    """An object of core's class of text models, without weights. shapes: of all parameters, by part."""
    kind = type("AscendTextEncoders", (RemoteTextModel, imported(core.model)), {})
    model = kind(WHAT)
    model.names = dict(_named(core, shapes))
    model.dtypes = {torch.float32}
    for name, value in core.attributes.items():
        setattr(model, name, value)
    for part, encoder in core.encoders.items():
        setattr(model, encoder.attribute, RemoteEncoder(handle, part, encoder))
    return model


def _named(core: CoreText, shapes: Mapping[str, Mapping[str, list[int]]]) -> Iterator[tuple[str, Tensor]]:
    for part, encoder in core.encoders.items():
        for name, shape in shapes[part].items():
            yield encoder.prefix + name, torch.empty(shape, device="meta")


def imported(name: str) -> type:
    """A class of core's, "module:class"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def saved() -> ValueError:
    return ValueError(in_ranks(WHAT, "saved"))
