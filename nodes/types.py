"""The pack's own socket types, and what travels through them: descriptions, which outlive any process."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..ascend_runtime.specs import DiffusionModelSpec, OperatorSpec, ParallelSpec, TextEncoderSpec, VaeSpec

Parallel = io.Custom("ASCEND_PARALLEL")
DiffusionModel = io.Custom("ASCEND_MODEL")
TextEncoder = io.Custom("ASCEND_TEXT_ENCODER")
Vae = io.Custom("ASCEND_VAE")
Profile = io.Custom("ASCEND_PROFILE")
Acceleration = io.Custom("ASCEND_ACCELERATION")


@dataclass(frozen=True)
class RanksHandle:
    """Which ranks to work on. The default takes those that are alive, else one a visible device."""

    parallel: ParallelSpec | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Handle:
    """A network on disk and the ranks that it belongs to."""

    spec: DiffusionModelSpec | TextEncoderSpec | VaeSpec
    ranks: RanksHandle


@dataclass(frozen=True)
class ModelHandle(Handle):
    """A diffusion model, and how it is to be run."""

    operators: OperatorSpec = OperatorSpec()
    warm_up: bool = False


def parallel_input() -> io.Input:
    """The optional input of every loader."""
    return Parallel.Input(
        "parallel",
        optional=True,
        tooltip="From Ascend Parallel Config. Without it, the ranks that are alive are used, else one rank a device.",
    )
