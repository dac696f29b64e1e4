"""The messages between the client and the ranks: typed, tagged, and encoded as MessagePack.

A tensor is encoded as its offset in a block of shared memory that is sent with the message, so its bytes never go
through the encoder. A `SharedTensor` is memory that the sender lends: the receiver maps the same pages.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
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
from ..specs.record import JobRecord
from .control import Cancel, Located, Message, Shutdown, Wrote
from .packets import Undecodable
from .plans import PlannedJob

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype requires
MAX_TENSOR_DIMS, MAX_TENSOR_BYTES = 16, 2**48  # of one tensor
MAX_ENTRIES, MAX_ENTRY_NAME = 16, 64  # of a conditioning's further entries of a kind; characters of a name
UNREAD = 0  # the job of a `Failed` that replies to an unreadable message; jobs are numbered from 1
WIRE_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                  torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in WIRE_DTYPES.items()}


class SharedTensor:
    """A tensor in shared memory. `fd` is an open file descriptor, which this object owns."""

    def __init__(self, fd: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.fd = fd
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def close(self) -> None:
        """Closes the descriptor; existing mappings stay valid."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self):
        self.close()


EntryName = Annotated[str, Meta(min_length=1, max_length=MAX_ENTRY_NAME)]


class Conditioning(Struct, kw_only=True):
    """The inputs of one guidance branch besides the noisy latent.

    text [B or 1, L, D]: the text embedding.
    concat_latent [B or 1, C, T, H, W]: the latent of the known part of the video, not normalised.
    concat_mask [B or 1, 1 or 4, T, H, W]: 0 where it is known; with 4 channels, one for each frame of a latent frame.
    clip_vision [B or 1, I, image_dim]: CLIP's penultimate hidden states of one image, or of two concatenated.
    pooled [B or 1, D]: the pooled text embedding, for models that use one.
    tensors, numbers: further entries by name, as core ComfyUI's CONDITIONING names them, such as "attention_mask" and
        "guidance". A model's conditioner reads or refuses them by name (models.shared.conditioning.Conditioner).
        The number None means "without", where the entry's absence means the model's own value.
    """

    text: Tensor
    pooled: Tensor | None = None
    concat_latent: Tensor | None = None
    concat_mask: Tensor | None = None
    clip_vision: Tensor | None = None
    tensors: Annotated[dict[EntryName, Tensor], Meta(max_length=MAX_ENTRIES)] = {}
    numbers: Annotated[dict[EntryName, float | None], Meta(max_length=MAX_ENTRIES)] = {}


class Ping(Message):
    """Requests a `Done` from every rank. `tensor` is sent to the ranks; rank 0 returns `reply` floats."""

    job: int
    tensor: Tensor | None = None
    reply: int = 0
    frames: SharedTensor | None = None


class Load(Message):
    """Loads components. parallel: the plan of the jobs that will use them. computing: see `Sample`."""

    job: int
    parallel: ParallelSpec = ParallelSpec()
    model: DiffusionModelSpec | None = None
    encoder: TextEncoderSpec | None = None
    vae: VaeSpec | None = None
    computing: int | None = None


class Encode(Message):
    """Encodes a prompt. image [H,W,3]: in 0..1, which the prompt is about. image_interleave: of its tokens, one in so
    many is part of the result."""

    job: int
    encoder: TextEncoderSpec
    text: str
    image: Tensor | None = None
    image_interleave: int = 2


class EncodeTokens(Message):
    """Encodes tokens as they are, with one of the text encoders.

    part: which. ids [S]: int64. length: the number of those up to the end of the text; those after it are padding.
    places, embeddings: [n, D] each, in the place of one token each, such as an image's.
    """

    job: int
    encoder: TextEncoderSpec
    part: str
    ids: Tensor
    length: int
    places: tuple[int, ...] = ()
    embeddings: list[Tensor] = []


class Sample(Message):
    """Denoises latent [B,C,T,H,W]. preview: whether rank 0 sends an image after each step.

    noise_mask [B or 1, 1, T, H, W]: 0 where the latent is known and kept, 1 where it is generated; None generates all.
    warm_up: runs two discarded steps first, unless the loaded model has been warmed up for this kind of job.
    profile: its steps and its rank must exist in this job.
    calibration: of each expert, from the file next to the model, if the step cache needs it. The client sends it, so
        that all ranks have the same.
    computing: the bytes of a device that the job is predicted to take besides the model's weights; None: not known.
    history: the tensors that the job returned whose steps this one follows.
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
    computing: int | None = None
    history: dict[str, Tensor] = {}


class ModelPass(Struct, kw_only=True):
    """One pass through the network for a sampler outside of the ranks.

    branch: of guidance, "cond" or "uncond". latent: which of the message's latents is its input.
    timesteps [B], or [B, T] with one for each latent frame: in 0..1000.
    inputs: what stays the same from call to call, by name (models.shared.conditioning.Inputs): numbers of tensors that
        the ranks hold.
    skipped: the blocks that are left out, in one numbering whatever their kinds.
    """

    branch: str
    latent: int
    timesteps: Tensor
    inputs: Annotated[dict[EntryName, int], Meta(max_length=MAX_ENTRIES)]
    skipped: tuple[int, ...] = ()


class SamplerRun(Struct, frozen=True, kw_only=True):
    """A run of a sampler outside of the ranks. number: no other run has it. sigmas: all of its noise levels,
    decreasing, in 0..1; a step is one of them but the last."""

    number: int
    sigmas: tuple[float, ...]


class CallSetting(Struct, frozen=True, kw_only=True):
    """What all calls of a run of a sampler outside of the ranks share. calibration, computing: see
    `Sample`."""

    model: DiffusionModelSpec
    parallel: ParallelSpec
    run: SamplerRun
    operators: OperatorSpec = OperatorSpec()
    acceleration: AccelerationSpec = AccelerationSpec()
    calibration: dict[str, Calibration] = {}
    computing: int | None = None


class Velocity(Message):
    """Requests the velocity of each pass, for a sampler outside of the ranks. All have the same shape.

    setting: None: that of the call before. latents: each [B,C,T,H,W], normalised. step: of the run, from 0.
    fresh: the ranks first forget all numbers, and what earlier calls have prepared.
    held: new tensors, by number; numbers are never used twice. drop: numbers that the ranks need no more.
    """

    job: int
    setting: CallSetting | None
    step: int
    latents: list[Tensor]
    passes: list[ModelPass]
    fresh: bool = False
    held: dict[int, Tensor] = {}
    drop: tuple[int, ...] = ()


class Decode(Message):
    """Decodes latent [B,C,T,H,W]. The ranks write the frames [B*T',H',W',3] into `frames`."""

    job: int
    vae: VaeSpec
    latent: Tensor
    frames: SharedTensor


class EncodeVideo(Message):
    """Encodes frames [T,H,W,3] in 0..1. The ranks write the latent [1,C,T',H',W'] into `latent`."""

    job: int
    vae: VaeSpec
    frames: Tensor
    latent: SharedTensor


class Describe(Message):
    """Requests facts from model files: `Done.info` has the VAE's form, the diffusion model's calibration, or what a
    network is (`client.runtime.Runtime.network`). Of text encoders also `Done.tensor` (see `Runtime.text_encoders`)."""

    job: int
    vae: VaeSpec | None = None
    model: DiffusionModelSpec | None = None
    network: DiffusionModelSpec | None = None
    encoder: TextEncoderSpec | None = None


class Choose(Message):
    """Requests a plan for a job, from the headers of files and the ranks' free memory: `Done.info["plan"]` is a
    `wire.plans.Chosen`, in builtin types; None if no plan takes so little.

    below, below_host: bytes of a device, and of the host; only plans that take less are asked for. 0: any that fit.
    """

    job: int
    planned: PlannedJob
    below: int = 0
    below_host: int = 0


class Free(Message):
    """Frees the weights of all components."""

    job: int


class Ready(Message):
    """A rank's first message, after it has joined the group. group: a name that only ranks of one group share; empty if
    the client has started them."""

    rank: int
    group: str = ""


class Progress(Message):
    """`stage` has finished `step` of `total` parts; the parts of "load" are bytes (see `components.Components.get`)."""

    job: int
    stage: str
    step: int
    total: int


class Preview(Message):
    """image: uint8 [H,W,3], the middle frame of the x0 prediction after `step` of `total`."""

    job: int
    step: int
    total: int
    image: Tensor


class Done(Message):
    """A job has finished. seconds: synchronised wall time of each stage. info: facts by name. tensors: further results
    by name. record: of rank 0: what a video's metadata say about the job (specs/record.py)."""

    job: int
    seconds: dict[str, float] = {}
    info: dict[str, Any] = {}
    record: JobRecord | None = None
    tensor: Tensor | None = None
    tensors: dict[str, Tensor] = {}


class Failed(Message):
    """A job has failed. kind: "user" (an invalid request), "internal" (an error in this rank), "peer" (another rank
    failed) or "cancelled". job: UNREAD if the message could not be read.
    """

    job: int
    kind: str
    error: str
    traceback: str = ""


AnyMessage = (
    Ping | Load | Encode | EncodeTokens | Sample | Velocity | Decode | EncodeVideo | Describe | Choose | Free | Cancel
    | Shutdown | Located | Ready | Wrote | Progress | Preview | Done | Failed
)  # fmt: skip


@dataclass(frozen=True)
class Parcel:
    """An encoded message: its body, its tensors in a block of `size` bytes, and the memory that it lends."""

    body: bytes
    tensors: tuple[tuple[int, Tensor], ...]  # (offset, tensor)
    size: int
    shared: tuple[SharedTensor, ...]


def encode(message: Message) -> Parcel:
    """Encodes `message` and assigns 64-byte aligned offsets to its tensors.

    Raises ValueError for everything that `decode` would reject, so that a caller's mistake never reaches the other
    side.
    """
    tensors: list[tuple[int, Tensor]] = []
    shared: list[SharedTensor] = []
    size = 0

    def hook(value):
        nonlocal size
        if isinstance(value, Tensor):
            offset = size
            tensors.append((offset, value))
            size = _aligned(offset + value.nbytes)
            return [offset, _dtype_name(value.dtype), list(value.shape)]
        if isinstance(value, SharedTensor):
            shared.append(value)
            return [len(shared) - 1, _dtype_name(value.dtype), list(value.shape)]
        raise ValueError(f"{type(value).__name__} cannot be sent in a message.")

    try:
        body = msgspec.msgpack.encode(message, enc_hook=hook)
        _reader.check(body)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"A text contains half a character ({half!r}), such as half an emoji. Remove it.") from None
    except (msgspec.MsgspecError, OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"{type(message).__name__} cannot be sent: {error}") from None
    return Parcel(body, tuple(tensors), size, tuple(shared))


def decode(body: bytes, block, shared: list[int]) -> Message:
    """Decodes a message. Its tensors are views of `block`, a writable buffer (None if it has no tensors).

    shared: received descriptors; those that no tensor of the message owns are closed. Raises Undecodable.
    """
    return _reader.read(body, block, shared)


class _Reader(threading.local):
    """A decoder per thread, kept because creating one takes ten times as long as decoding a message."""

    def __init__(self):
        self._decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=self._place)
        self._checker = msgspec.msgpack.Decoder(AnyMessage, dec_hook=_stand_in)
        self._block, self._shared = None, []

    def check(self, body: bytes) -> None:
        """Raises the errors that `read` would raise, without the tensors' data."""
        self._checker.decode(body)

    def read(self, body: bytes, block, shared: list[int]) -> Message:
        self._block, self._shared = block, list(shared)
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
            raise Undecodable(f"The message cannot be decoded ({error}).") from None
        finally:
            for descriptor in self._shared:  # those left that no tensor owns
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
        """Returns a received descriptor; each can be used once."""
        if place >= len(self._shared) or self._shared[place] is None:
            raise ValueError(f"descriptor {place}, which did not arrive")
        descriptor, self._shared[place] = self._shared[place], None
        return descriptor


def _stand_in(kind: type, value: Any):
    _, dtype, shape = _checked(value)
    return torch.empty(0, dtype=dtype) if kind is Tensor else SharedTensor(-1, dtype, shape)


def _checked(value: Any) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """A tensor's place (a byte offset, or a descriptor's index), dtype and shape. Raises ValueError if invalid."""
    if type(value) is not list or len(value) != 3:
        raise ValueError("a tensor without place, dtype and shape")
    place, name, shape = value
    sizes = shape if type(shape) is list else [None]
    if type(name) is not str or name not in WIRE_DTYPES:
        raise ValueError("a tensor with an unsupported dtype")
    if len(sizes) > MAX_TENSOR_DIMS or not all(type(size) is int and size >= 0 for size in (place, *sizes)):
        raise ValueError("a tensor with an invalid shape")
    dtype = WIRE_DTYPES[name]
    if math.prod(size or 1 for size in sizes) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise ValueError("a tensor that is too large")
    return place, dtype, tuple(sizes)


_reader = _Reader()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise ValueError(f"tensors of {dtype} are not supported; supported are {', '.join(WIRE_DTYPES)}")
    return _NAMES[dtype]
