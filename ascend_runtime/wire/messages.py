"""What the client and the ranks say to each other: typed, tagged messages, encoded as MessagePack.

A tensor in a message is written as its place in the parcel that travels beside it; the bytes never enter the
encoder. A `SharedTensor` is memory that the sender lends: the receiver maps the same pages.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from ..specs import (
    AccelerationSpec,
    Calibration,
    DiffusionModelSpec,
    OperatorSpec,
    ParallelSpec,
    ProfileSpec,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
)

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for
MOST_DIMS, MOST_BYTES = 16, 2**48  # of one tensor
UNREAD = 0  # the job that a `Failed` names where the message that it answers could not be read; jobs count from 1
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                  torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Undecodable(ValueError):
    """What came is no message, or names a tensor that it did not bring."""


class SharedTensor:
    """A tensor in memory shared by descriptor: `fd` is an open file descriptor, which this object owns."""

    def __init__(self, fd: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.fd = fd
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def close(self) -> None:
        """Closes the descriptor; what is mapped stays mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self):
        self.close()


class Conditioning(Struct, kw_only=True):
    """What one branch of guidance sees beside the noisy latent.

    text [B or 1, L, D].
    concat_latent [B or 1, C, T, H, W]: latent, not normalised, of the video as far as it is known.
    concat_mask [B or 1, 1 or 4, T, H, W]: 0 where it is known; one channel for each of a latent frame's 4 frames.
    clip_vision [B or 1, I, image_dim]: CLIP's penultimate hidden states of an image, or of two one after the other.
    pooled [B or 1, D]: one vector of the whole prompt, for models that read one.
    """

    text: Tensor
    pooled: Tensor | None = None
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


class Describe(Message):
    """Asks rank 0 what the files of a model say: `Done.info` has the VAE's form, the diffusion model's calibration."""

    job: int
    vae: VaeSpec | None = None
    model: DiffusionModelSpec | None = None


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
    """seconds: synchronised wall time by stage; info: facts by name. tensors: further results by name."""

    job: int
    seconds: dict[str, float] = {}
    info: dict[str, Any] = {}
    tensor: Tensor | None = None
    tensors: dict[str, Tensor] = {}


class Failed(Message):
    """kind: "user" (the request is at fault), "internal" (the rank is), "peer" (another rank is) or "cancelled".

    job: UNREAD where the message that it answers could not be read.
    """

    job: int
    kind: str
    error: str
    traceback: str = ""


AnyMessage = (
    Ping | Load | Encode | Sample | Decode | EncodeVideo | Describe | Free | Cancel | Shutdown
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
    """Writes `message`; its tensors get their places, 64-byte aligned, in the order in which they stand.

    Raises ValueError for what `decode` would refuse, so that a caller's mistake never reaches the other side.
    """
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
        raise ValueError(f"{type(value).__name__} cannot travel in a message.")

    try:
        body = msgspec.msgpack.encode(message, enc_hook=hook)
        _reader.check(body)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"A text holds half a character ({half!r}), as of a cut emoji. Write the whole one.") from None
    except (msgspec.MsgspecError, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"{type(message).__name__} cannot be sent: {error}") from None
    return Parcel(body, tuple(tensors), size, tuple(shared))


def decode(body: bytes, block, shared: list[int]) -> Message:
    """Reads a message; its tensors are views of `block`, a writable buffer (None where it has no tensors).

    `shared`: descriptors that came along; those are closed that no tensor of the message owns. Raises Undecodable.
    """
    return _reader.read(body, block, shared)


class _Reader(threading.local):
    """A decoder a thread, kept: to make one takes ten times as long as to read a message with it."""

    def __init__(self):
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._place)
        self._checker = msgspec.msgpack.Decoder(AnyMessage, dec_hook=_stand_in)
        self._block, self._shared = None, []

    def check(self, body: bytes) -> None:
        """Raises what reading it would, whatever its tensors hold."""
        self._checker.decode(body)

    def read(self, body: bytes, block, shared: list[int]) -> Message:
        self._block, self._shared = block, list(shared)
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
            raise Undecodable(f"What came is no message ({error}).") from None
        finally:
            for descriptor in self._shared:  # that no tensor took
                if descriptor is not None:
                    os.close(descriptor)
            self._block, self._shared = None, []

    def _place(self, kind: type, value: Any):
        place, dtype, shape = _checked(value)
        count = math.prod(shape)
        if kind is SharedTensor:
            return SharedTensor(self._take(place), dtype, shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        held = 0 if self._block is None else len(self._block)
        if place % ALIGNMENT or place + count * dtype.itemsize > held:
            raise ValueError(f"a tensor {list(shape)} at byte {place} of {held}")
        return torch.frombuffer(self._block, dtype=dtype, count=count, offset=place).view(shape)

    def _take(self, place: int) -> int:
        """A descriptor that came along, once."""
        if place >= len(self._shared) or self._shared[place] is None:
            raise ValueError(f"descriptor {place}, which did not come")
        descriptor, self._shared[place] = self._shared[place], None
        return descriptor


def _stand_in(kind: type, value: Any):
    _, dtype, shape = _checked(value)
    return torch.empty(0, dtype=dtype) if kind is Tensor else SharedTensor(-1, dtype, shape)


def _checked(value: Any) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """A tensor's place (a byte, or the number of a descriptor), dtype and shape. Raises ValueError for all else."""
    if type(value) is not list or len(value) != 3:
        raise ValueError("a tensor that is no place, dtype and shape")
    place, name, shape = value
    sizes = shape if type(shape) is list else [None]
    if type(name) is not str or name not in DTYPES:
        raise ValueError("a tensor of no dtype that travels")
    if len(sizes) > MOST_DIMS or not all(type(size) is int and size >= 0 for size in (place, *sizes)):
        raise ValueError("a tensor of no shape that travels")
    dtype = DTYPES[name]
    if math.prod(size or 1 for size in sizes) * dtype.itemsize > MOST_BYTES:
        raise ValueError("a tensor of more bytes than any memory")
    return place, dtype, tuple(sizes)


_reader = _Reader()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise ValueError(f"a tensor of {dtype} cannot travel; {', '.join(DTYPES)} can")
    return _NAMES[dtype]
