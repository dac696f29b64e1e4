"""Messages as no honest side sends them: mutated bodies and headers, with descriptors that nobody announced."""

import os
import random
import socket
import struct

import torch
from ascend_runtime.wire import messages, packets
from ascend_runtime import specs
from ascend_runtime.wire.messages import Conditioning, Done, Failed, Ping, Preview, Progress, Sample

MOST_DESCRIPTORS = 200
# What MessagePack's types announce without bringing: arrays, maps, texts and binaries of 4 billion, and depth.
ANNOUNCED = [
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\x91" * 3000, b"\xcf" + b"\xff" * 8, b"\xcb\x7f\xf8" + b"\0" * 6,
]  # fmt: skip
MODEL = specs.DiffusionModelSpec(path="/models/wan")
TO_RANKS = [
    Ping(job=1, tensor=torch.ones(3)),
    messages.Encode(job=3, encoder=specs.TextEncoderSpec(path="/nowhere"), text="a cat"),
    messages.EncodeTokens(job=3, encoder=specs.TextEncoderSpec(path="/nowhere"), part="text_encoder",
                          ids=torch.arange(5), length=4, places=(1,), embeddings=[torch.ones(2, 3)]),
    messages.Load(job=2, model=MODEL),
    Sample(job=4, model=MODEL, parallel=specs.ParallelSpec(), spec=specs.SampleSpec(sigmas=(1.0, 0.5, 0.0)),
           latent=torch.ones(1, 16, 1, 2, 2), positive=Conditioning(text=torch.ones(1, 4, 2))),
    messages.Velocity(
        job=6, step=0, latents=[torch.ones(1, 16, 1, 2, 2)], held={1: torch.ones(1, 4, 2)},
        setting=messages.CallSetting(
            model=MODEL, parallel=specs.ParallelSpec(), run=messages.SamplerRun(number=1, sigmas=(1.0, 0.0))),
        passes=[messages.ModelPass(branch="cond", latent=0, timesteps=torch.ones(1), inputs={"text": 1})]),
    Sample(job=5, model=MODEL, parallel=specs.ParallelSpec(), spec=specs.SampleSpec(),
           latent=torch.ones(1, 16, 1, 2, 2), positive=Conditioning(
               text=torch.ones(1, 4, 2), tensors={"attention_mask": torch.ones(1, 4)},
               numbers={"guidance": 6.0, "guiding_frame_index": 0.0, "none": None})),
]  # fmt: skip
TO_CLIENT = [
    Done(job=1, seconds={"load": 0.5}, info={"spatial": [8, {"a": None}]}, tensor=torch.ones(2, 3)),
    Progress(job=1, stage="denoise", step=1, total=2),
    Preview(job=1, step=1, total=2, image=torch.zeros(2, 3, 3, dtype=torch.uint8)),
    Failed(job=1, kind="user", error="no", traceback="line\n" * 100),
]
SHAPES = [  # of tensors, as they are written: [place, dtype, shape]
    [0, "float32", [2**40]], [0, "float32", [[0] * 3, 2**62]], [-64, "float32", [1]], [0, "load", [1]],
    [3, "uint8", [1]], [0, "float32", [-1]], [0, "float32", [True]], [2**63, "float32", [1]],
    [0, "float32", [0, 2**62, 2**62]], [0, "float32", [1] * 100], [0, "__dict__", [1]], [0, "float32", 5],
    [0, "complex64", [1]], "tensor", [], {},
]  # fmt: skip


def encoded(message) -> tuple[bytes, int]:
    """A message's body, and the bytes of its tensors."""
    parcel = messages.encode(message)
    return parcel.body, parcel.size


def mutated(body: bytes, rng: random.Random) -> bytes:
    """With up to five changes: bytes flipped, cut out, put in, written twice; announcements of what does not come."""
    data = bytearray(body)
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(data) + 1)
        change = rng.randrange(6)
        if change == 0 and data:
            data[place % len(data)] = rng.randrange(256)
        elif change == 1:
            del data[place : place + rng.randint(1, 20)]
        elif change == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        elif change == 3:
            data[place:place] = data[place : place + 40]
        else:
            data[place : place + rng.randint(0, 5)] = rng.choice(ANNOUNCED)
    return bytes(data)


def framed(body: bytes, block: int, descriptors: int, rng: random.Random, lie: bool) -> bytes:
    """With a header; one that lies has one of its fields wrong."""
    fields = [packets._MAGIC, len(body), block, descriptors]
    if lie:
        field = rng.randrange(4)
        sizes = [0, 1, 7, 2**31, 2**32 - 1, rng.randrange(2**20)]
        fields[field] = rng.randbytes(4) if field == 0 else rng.choice(sizes)
    return packets._HEADER.pack(*fields) + body


class Descriptors:
    """Open files to send along: of each kind that a descriptor can be of. A context manager."""

    def __enter__(self):
        self._memory = os.memfd_create("ascend-hostile")
        os.ftruncate(self._memory, 4096)
        self._pipe = os.pipe()
        self._socket = socket.socket()
        self._all = [self._memory, *self._pipe, self._socket.fileno(), os.open("/dev/zero", os.O_RDONLY)]
        return self

    def some(self, rng: random.Random) -> list[int]:
        count = rng.choice([0, 0, 0, 1, 1, 2, 8, 9, rng.randint(0, MOST_DESCRIPTORS)])
        return [rng.choice(self._all) for _ in range(count)]

    def __exit__(self, *_):
        for descriptor in (self._memory, *self._pipe, self._all[-1]):
            os.close(descriptor)
        self._socket.close()


def send(sock: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """All of it; the descriptors go with the first byte."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
    sent = sock.sendmsg([data], control if descriptors else [])
    sock.sendall(data[sent:])
