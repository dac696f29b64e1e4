"""What a client asks about a job's plan, and what the ranks answer."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from ..specs import AccelerationSpec, DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec, VideoSize

TEXT_TOKENS = 512  # of a prompt whose embedding is not known yet


class PlannedJob(Struct, frozen=True, kw_only=True):
    """All that a job's plan depends on. What its specs leave open is to be chosen.

    shape: of the latent [B,C,T,H,W]; None: of a video of `size`. size: None: the model's own.
    sample: its seed has no effect. branches: the passes of each step; 0: by the guidance scales.
    text_tokens: of a prompt. per_token: whether each token has its own timestep, as a first frame is given.
    encoder, vae: those of the whole job, if they are asked about too.
    """

    model: DiffusionModelSpec
    parallel: ParallelSpec = ParallelSpec()
    shape: tuple[int, ...] | None = None
    size: VideoSize | None = None
    sample: SampleSpec = SampleSpec()
    branches: int = 0
    text_tokens: int = TEXT_TOKENS
    per_token: bool = False
    acceleration: AccelerationSpec = AccelerationSpec()
    encoder: TextEncoderSpec | None = None
    vae: VaeSpec | None = None


class Chosen(Struct, frozen=True, kw_only=True):
    """How a job is arranged, and what it is predicted to take.

    parallel, experts, packed, encoder, tiles: as in specs, with what they left open filled in.
    line: what was chosen, why, and what it is predicted to take, for the user.
    seconds: by stage. sent: bytes of a rank in a step, by mesh axis. device, host: bytes at the peak, of the rank that
    takes the most of its device, and of all ranks of a host. device_free, host_free: what there is. computing: the
    bytes of `device` that denoising takes besides the model's weights; None: not predicted.
    short: whether it takes more than there is: the user has left nothing to choose.
    warning: of what it costs, if it sends much between machines.
    """

    parallel: ParallelSpec
    experts: str = "auto"
    packed: bool | None = None
    encoder: str = "auto"
    tiles: str = "auto"
    line: str = ""
    seconds: dict[str, float] = {}
    sent: dict[str, int] = {}
    device: int = 0
    device_free: int = 0
    host: int = 0
    host_free: int = 0
    computing: int | None = None
    short: bool = False
    warning: str = ""

    @property
    def warnings(self) -> list[str]:
        return [self.line] * self.short + [self.warning] * bool(self.warning)

    def arranged(self, model: DiffusionModelSpec) -> DiffusionModelSpec:
        """The model's spec, with its experts and the form of its weights as they were chosen."""
        return replace(model, experts=self.experts, packed=self.packed)
