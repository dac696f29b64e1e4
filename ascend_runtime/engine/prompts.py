"""Encodes tokens that were made elsewhere, describes text encoders for those who make them, and keeps the last results,
so that a repeated prompt needs no text encoder."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..components.networks import empty_network
from ..errors import coded_error
from ..models.shared.text import TEXT, Encoder, GivenTokens, OnBlock, TextEncoding
from ..ops.finite import check_finite
from ..recognition.component import Component
from ..wire.messages import EncodeTokens

KNOWN_PROMPTS = 16  # at most 4 MB each for UMT5-XXL in bfloat16, 8 MB in float32
MAX_KNOWN = 1024  # tokens; the results of longer texts are not kept


@dataclass(frozen=True)
class Encoded:
    """results: the text encoders' outputs by name. warnings: about the prompt, for the user."""

    results: dict[str, Tensor]
    warnings: list[str]


def image_key(image: Tensor) -> Hashable:
    """A key that is equal for equal images [H,W,3]."""
    values = image.float().cpu().contiguous()
    return tuple(values.shape), hashlib.sha256(values.numpy()).digest()


class KnownPrompts:
    """A least-recently-used cache of KNOWN_PROMPTS encoded prompts.

    A key contains everything that determines the result, including the full text, so no two prompts are confused.
    """

    def __init__(self):
        self._known: OrderedDict[Hashable, Encoded] = OrderedDict()

    def get(self, key: Hashable) -> Encoded | None:
        return self._known.get(key)

    def keep(self, key: Hashable, encoded: Encoded) -> None:
        """Stores a prompt as the most recently used one."""
        self._known[key] = encoded
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_PROMPTS:
            self._known.popitem(last=False)


def given_tokens(message: EncodeTokens) -> GivenTokens:
    """The tokens of a job. Raises ValueError for embeddings that cannot be read."""
    for embedding in message.embeddings:
        check_finite(embedding, "An embedding in the place of a token")
    return GivenTokens(message.ids, message.length, dict(zip(message.places, message.embeddings)))


def tokens_key(part: str, given: GivenTokens) -> Hashable:
    """A key that is equal for equal tokens of an encoder."""
    ids = hashlib.sha256(given.ids.contiguous().numpy()).digest()
    embeddings = tuple((at, image_key(one)) for at, one in sorted(given.embeddings.items()))
    return "tokens", part, len(given.ids), ids, given.length, embeddings


def encoded_tokens(
    encoding: TextEncoding, part: str, encoder: Encoder | None, given: GivenTokens, on_block: OnBlock
) -> dict[str, Tensor]:
    """The outputs of an encoder; see TextEncoding.encode_tokens. Raises ValueError, on all ranks alike, for tokens that
    the encoder does not know."""
    if encoder is None:
        raise ValueError(f"The model has no text encoder {part!r}.")
    known, largest = encoding.embeddings_in(part, encoder.model), int(given.ids.max())
    if largest >= known or int(given.ids.min()) < 0:
        raise coded_error(
            "AV-1410",
            f"The text has a token {largest}, but the text encoder has embeddings for {known}: the tokenizer belongs "
            f"to another model. {encoding.advice(part)}",
        )
    return encoding.encode_tokens(part, encoder, given, on_block)


def with_padding(results: dict[str, Tensor], given: GivenTokens) -> dict[str, Tensor]:
    """In fp32, with zeros for the padding that TEXT lacks."""
    made = {name: tensor.float() for name, tensor in results.items()}
    missing = len(given.ids) - made[TEXT].shape[1]
    return made if missing <= 0 else made | {TEXT: F.pad(made[TEXT], (0, 0, 0, missing))}


def described_encoders(found: list[Component]) -> tuple[dict[str, Any], Tensor | None]:
    """What text encoders are, without reading their weights, and the tokenizer that core ComfyUI takes from them."""
    family = found[0].family
    shapes = {one.kind.name: _shapes(one) for one in found}
    facts: dict[str, Any] = {"family": family.name, "shapes": shapes}
    core = family.core_text
    if core is None or core.own_tokenizer is None:
        return facts, None
    (own,) = (one for one in found if one.kind.name == core.own_tokenizer.part)
    file = family.text().tokenizer_file(own.kind.name, own.tokenizer, own.shards[0])
    facts["sentencepiece"] = file.sentencepiece
    return facts, torch.frombuffer(bytearray(file.content), dtype=torch.uint8)


def _shapes(component: Component) -> dict[str, list[int]]:
    return {name: list(one.shape) for name, one in empty_network(component).named_parameters()}
