"""Published models: their files on hubs, and their networks."""

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


@dataclass(frozen=True)
class HubFile:
    """A file that hubs publish. repository: owner/name, the same on each hub. path: of the file in it. folder: of
    ComfyUI's models, for the file."""

    repository: str
    path: str
    folder: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def address(self, hub: str, endpoint: str | None = None) -> str:
        """Its URL. hub: a key of ENDPOINTS. endpoint: a mirror of the hub."""
        place = (endpoint or ENDPOINTS[hub]).rstrip("/") + PREFIXES[hub]
        return f"{place}/{self.repository}/resolve/{REVISIONS[hub]}/{self.path}"


HUGGING_FACE, MODELSCOPE = "huggingface", "modelscope"
ENDPOINTS = {HUGGING_FACE: "https://huggingface.co", MODELSCOPE: "https://modelscope.cn"}
PREFIXES = {HUGGING_FACE: "", MODELSCOPE: "/models"}  # of a repository, behind the endpoint
REVISIONS = {HUGGING_FACE: "main", MODELSCOPE: "master"}


def repackaged(repository: str, folder: str, *names: str) -> tuple[HubFile, ...]:
    """Files that Comfy-Org publishes for ComfyUI's own templates."""
    return tuple(HubFile(f"Comfy-Org/{repository}", f"split_files/{folder}/{name}.safetensors", folder)
                 for name in names)  # fmt: skip
