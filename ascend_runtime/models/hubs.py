"""Published models: where they can be downloaded, and their networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HUBS = "from Hugging Face or ModelScope"


@dataclass(frozen=True)
class PublishedModel:
    """The configs of a published model's networks. transformers: the high-noise expert first. parts: of the text
    encoders, the vision tower and the VAE, by part of the family."""

    transformers: tuple[Mapping[str, Any], ...]
    parts: Mapping[str, Mapping[str, Any]]
