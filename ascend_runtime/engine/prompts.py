"""The last prompts and what text encoders made of them, so that a known one needs no encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

KNOWN_PROMPTS = 16  # of UMT5-XXL 4 MB each at most in bfloat16, 8 in float32


@dataclass(frozen=True)
class Encoded:
    """results: of the text encoders, by name. warnings: what the user should know of the prompt."""

    results: dict[str, Tensor]
    warnings: list[str]


class KnownPrompts:
    """What text encoders made of the last prompts; of more than KNOWN_PROMPTS, the one goes first that was
    asked for the longest ago.

    Each is found by all that decides the result, its whole text included: two are never taken for each other.
    """

    def __init__(self):
        self._known: OrderedDict[Hashable, Encoded] = OrderedDict()

    def get(self, key: Hashable) -> Encoded | None:
        return self._known.get(key)

    def keep(self, key: Hashable, encoded: Encoded) -> None:
        """From now on it is the one that was asked for last."""
        self._known[key] = encoded
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_PROMPTS:
            self._known.popitem(last=False)
