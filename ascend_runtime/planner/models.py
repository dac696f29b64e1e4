"""The facts of a model: from the headers of its files, or of a published model by its name."""

from __future__ import annotations

from ..specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from .facts import Model


def read(
    model: DiffusionModelSpec, encoder: TextEncoderSpec | None = None, vae: VaeSpec | None = None, kind: str = "npu"
) -> Model:
    """Of files; reads headers only. kind: of the devices, which decides automatic dtypes. Raises ValueError for files
    that cannot be used."""
    raise NotImplementedError


def published(name: str, kind: str = "npu", quantization: str = "none") -> Model:
    """Of a published model, such as "Wan2.2-T2V-A14B", without files. Raises ValueError for an unknown name."""
    raise NotImplementedError
