"""A cache of the last prompts' embeddings, so that a repeated prompt needs no text encoder."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

KNOWN_PROMPTS = 16  # at most 4 MB each for UMT5-XXL in bfloat16, 8 MB in float32


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
