"""The pack's own socket types and their values: descriptions, which stay valid when processes end."""

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

# What the page calls inputs and outputs whose names would be those of core's MODEL and VAE, which they cannot take.
NAMES = {DiffusionModel.io_type: "ascend model", Vae.io_type: "ascend vae"}


@dataclass(frozen=True)
class RanksHandle:
    """Which ranks to use. The default is the ranks that are running, or one per visible device.

    cluster: the name of a cluster on this host, whose ranks work on other machines; None: ranks of this machine.
    """

    parallel: ParallelSpec | None = None
    device: str = "auto"
    cluster: str | None = None


@dataclass(frozen=True)
class Handle:
    """A network on disk, and the ranks that run it."""

    spec: DiffusionModelSpec | TextEncoderSpec | VaeSpec
    ranks: RanksHandle


@dataclass(frozen=True)
class ModelHandle(Handle):
    """A diffusion model, and how to run it."""

    operators: OperatorSpec = OperatorSpec()
    warm_up: bool = False


def parallel_input() -> io.Input:
    """The optional input of every loader."""
    return Parallel.Input(
        "parallel",
        optional=True,
        tooltip="From Ascend Parallel Config. Without it: the ranks that are already running, or one rank per device.",
    )
