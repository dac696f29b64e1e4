"""What the client and the ranks say to each other: typed, tagged messages, encoded as MessagePack.

A tensor in a message is written as its place in the parcel that travels beside it; the bytes never enter the
encoder. A `SharedTensor` is memory that the sender lends: the receiver maps the same pages.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from .acceleration import AccelerationSpec, Calibration
from .specs import (
    DiffusionModelSpec,
    OperatorSpec,
    ParallelSpec,
    ProfileSpec,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
)

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for


class SharedTensor:
    """A tensor in memory shared by descriptor: `fd` is an open file descriptor of the process that has this object."""

    def __init__(self, fd: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.fd = fd
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Conditioning(Struct, kw_only=True):
    """What one branch of guidance sees beside the noisy latent.

    text [B or 1, L, D].
    concat_latent [B or 1, C, T, H, W]: latent, not normalised, of the video as far as it is known.
    concat_mask [B or 1, 1 or 4, T, H, W]: 0 where it is known; one channel for each of a latent frame's 4 frames.
    clip_vision [B or 1, I, image_dim]: CLIP's penultimate hidden states of an image, or of two one behind the other.
    """

    text: Tensor
    concat_latent: Tensor | None = None
    concat_mask: Tensor | None = None
    clip_vision: Tensor | None = None


class Message(Struct, tag=True, kw_only=True):
    """Base of all messages."""


class Ping(Message):
    """Asks every rank for a `Done`; `tensor` travels to the ranks, `reply` says how many floats rank 0 returns."""

    job: int
    tensor: Tensor | None = None
    reply: int = 0
    frames: SharedTensor | None = None


class Load(Message):
    """Makes the described components ready; parallel: the plan of the jobs to come."""

    job: int
    parallel: ParallelSpec = ParallelSpec()
    model: DiffusionModelSpec | None = None
    encoder: TextEncoderSpec | None = None
    vae: VaeSpec | None = None


class Encode(Message):
    job: int
    encoder: TextEncoderSpec
    text: str


class Sample(Message):
    """latent [B,C,T,H,W]; `preview` asks for one picture a step.

    noise_mask [B or 1, 1, T, H, W]: 0 where the latent is known and stays, 1 where it is to be made; None: all is.
    warm_up: two steps of the same kind come first, if none have been warmed up yet since the model was loaded.
    profile: its steps and its rank must be this job's. acceleration: what is left out of the computation.
    calibration: of each expert, what a file beside the model says, where a step cache asks for it: read once, so that
        all ranks have the same.
    """

    job: int
    model: DiffusionModelSpec
    parallel: ParallelSpec
    spec: SampleSpec
    latent: Tensor
    positive: Conditioning
    negative: Conditioning | None = None
    noise_mask: Tensor | None = None
    operators: OperatorSpec = OperatorSpec()
    warm_up: bool = False
    profile: ProfileSpec | None = None
    acceleration: AccelerationSpec = AccelerationSpec()
    calibration: dict[str, Calibration] = {}
    preview: bool = False


class Decode(Message):
    """latent [B,C,T,H,W]; the ranks write the frames [B*T',H',W',3] into `frames`."""

    job: int
    vae: VaeSpec
    latent: Tensor
    frames: SharedTensor


class EncodeVideo(Message):
    """frames [T,H,W,3] in 0..1; the ranks write the latent [1,C,T',H',W'] into `latent`."""

    job: int
    vae: VaeSpec
    frames: Tensor
    latent: SharedTensor


class Free(Message):
    """Drops the weights."""

    job: int


class Cancel(Message):
    job: int


class Shutdown(Message):
    pass


class Ready(Message):
    rank: int


class Progress(Message):
    """`stage` has done `step` of `total` parts; bytes, where it is "load" (see `components.Components.get`)."""

    job: int
    stage: str
    step: int
    total: int


class Preview(Message):
    """image: uint8 [H,W,3] of the middle frame as it is foreseen after `step` of `total`."""

    job: int
    step: int
    total: int
    image: Tensor


class Done(Message):
    """seconds: synchronised wall time by stage; info: facts by name."""

    job: int
    seconds: dict[str, float] = {}
    info: dict[str, Any] = {}
    tensor: Tensor | None = None


class Failed(Message):
    """kind: "user" (the request is at fault), "internal" (the rank is), "peer" (another rank is) or "cancelled"."""

    job: int
    kind: str
    error: str
    traceback: str = ""


AnyMessage = (
    Ping | Load | Encode | Sample | Decode | EncodeVideo | Free | Cancel | Shutdown
    | Ready | Progress | Preview | Done | Failed
)  # fmt: skip


@dataclass(frozen=True)
class Parcel:
    """An encoded message: `body`, the tensors to be laid out in one block of `size` bytes, and lent memory."""

    body: bytes
    tensors: tuple[tuple[int, Tensor], ...]  # (offset, tensor)
    size: int
    shared: tuple[int, ...]  # file descriptors


def encode(message: Message) -> Parcel:
    """Writes `message`; its tensors get their places, 64-byte aligned, in the order in which they stand."""
    tensors: list[tuple[int, Tensor]] = []
    shared: list[int] = []
    size = 0

    def hook(value):
        nonlocal size
        if isinstance(value, Tensor):
            offset = size
            tensors.append((offset, value))
            size = _aligned(offset + value.nbytes)
            return [offset, _dtype_name(value.dtype), list(value.shape)]
        if isinstance(value, SharedTensor):
            shared.append(value.fd)
            return [len(shared) - 1, _dtype_name(value.dtype), list(value.shape)]
        raise TypeError(f"{type(value).__name__} cannot travel in a message.")

    body = msgspec.msgpack.encode(message, enc_hook=hook)
    return Parcel(body, tuple(tensors), size, tuple(shared))


def decode(body: bytes, block, shared: list[int]) -> Message:
    """Reads a message; its tensors are views of `block`, a writable buffer (None where it has no tensors)."""
    return _reader.read(body, block, shared)


class _Reader(threading.local):
    """A decoder a thread, kept: to make one takes ten times as long as to read a message with it."""

    def __init__(self):
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._place)
        self._block, self._shared = None, []

    def read(self, body: bytes, block, shared: list[int]) -> Message:
        self._block, self._shared = block, shared
        try:
            return self._decoder.decode(body)
        finally:
            self._block, self._shared = None, []

    def _place(self, kind: type, value: list):
        place, dtype, shape = value
        dtype = getattr(torch, dtype)
        if kind is SharedTensor:
            return SharedTensor(self._shared[place], dtype, tuple(shape))
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=place).view(shape)


_reader = _Reader()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
