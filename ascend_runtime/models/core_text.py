"""How core ComfyUI tokenises and encodes the prompts of a family: the names of its classes, and what they expect.

Nodes make of it a CLIP whose work the ranks do (nodes/stock/clip.py). Nothing here imports ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CoreEncoder:
    """One text encoder in core's model of text encoders.

    attribute: of core's model, under which it is found; tokenizer: of core's tokenizer, its own.
    prefix: of its weights' names in core's model, before the parameters' own.
    special_tokens: of core's encoder: "start", "end" and "pad", those that it has.
    reports_mask: whether core puts the mask of its padding into the conditioning.
    layer: which hidden state core reads, as CLIP Set Last Layer counts them; None: the last one, normed.
    """

    attribute: str
    tokenizer: str
    prefix: str
    special_tokens: Mapping[str, int]
    reports_mask: bool = False
    layer: int | None = None


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer that core takes from the encoder's file.

    part: the encoder. data: the entry of core's tokenizer_data with its sentencepiece model. replaced: the entry that
    names a class instead of core's own. settings: of comfy.sd1_clip.SDTokenizer, for a tokenizer of another kind.
    """

    part: str
    data: str
    replaced: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class CoreText:
    """type: the family's name in core's loaders. tokenizer, model: core's classes, "module:class".
    encoders: by the family's part. attributes: further ones of core's model. own_tokenizer: see OwnTokenizer; None:
    core has the tokenizers itself.
    """

    type: str
    tokenizer: str
    model: str
    encoders: Mapping[str, CoreEncoder]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    own_tokenizer: OwnTokenizer | None = None
