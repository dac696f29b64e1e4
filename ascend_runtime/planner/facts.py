"""What a prediction is about: a model, a video, a machine, and how the ranks share the work. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..models.defaults import Defaults
from ..models.family import Family
from ..models.shapes import Shapes
from ..specs import AccelerationSpec, Plan
from ..specs.links import MachineLink


# Bytes of an element, by the names that torch gives dtypes.
ITEMSIZES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "float8_e4m3fn": 1, "int8": 1, "uint8": 1, "int32": 4,
    "int64": 8, "float8_e5m2": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


class StoredBlocks(NamedTuple):
    """A type of blocks in which a weight lies in a GGUF file, as ggml names it: so many neighbours of a row in so many
    bytes."""

    kind: str
    values: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Network:
    """A network without its weights. Equal only to itself, so that what is known of one can be cached.

    part: of the family (models.family.TRANSFORMER, VAE, TEXT_ENCODER, ...). shapes: of all parameters, by their names
    in the network. stored: bytes on disk. stored_types: the dtype of each parameter on disk, by name, as torch names
    it; empty: not known; "": it is read into other bytes.
    quantized: the dtype of each parameter of the layers that are kept in 8 bits or less, by name.
    packed: the weights that can stay in blocks of their file, by name. multiples: of inputs, in which tensor
    parallelism can cut quantized weights, by name; others in any number. It finds weights dequantized that it would cut
    otherwise.
    """

    part: str
    config: Mapping[str, Any]
    shapes: Shapes
    stored: int = 0
    stored_types: Mapping[str, str] = field(default_factory=dict)
    quantized: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, StoredBlocks] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """In all parameters."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class Model:
    """experts: one, or the high-noise and the low-noise one. dtype: of the blocks. encoders: those of the text, main
    one first. vae_dtype, text_dtype: as `dtype`. lora_numbers: in the files of its LoRAs, for each expert that gets
    them."""

    family: Family
    experts: tuple[Network, ...]
    defaults: Defaults
    dtype: str
    encoders: tuple[Network, ...] = ()
    text_dtype: str = "bfloat16"
    vae: Network | None = None
    vae_dtype: str = "float32"
    lora_numbers: int = 0


@dataclass(frozen=True)
class Video:
    """A video to make.

    shape: of the latent [B,C,T,H,W]. passes: for each step of the run, (the number of its expert, the number of
    guidance branches). text_tokens: of a prompt. per_token: whether each token has its own timestep. part: (first, end)
    of the steps that the job computes; None: all.
    """

    shape: tuple[int, int, int, int, int]
    passes: tuple[tuple[int, int], ...]
    text_tokens: int = 512
    per_token: bool = False
    acceleration: AccelerationSpec = AccelerationSpec()
    part: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        return len(self.passes)

    @property
    def computed(self) -> slice:
        """The steps that the job computes."""
        return slice(*(self.part or (0, self.steps)))

    @property
    def guided(self) -> bool:
        return any(branches > 1 for _, branches in self.passes[self.computed])


@dataclass(frozen=True)
class Arrangement:
    """How ranks share a job. fsdp: whether they shard the weights. experts: "resident" or "swap". encoder: where the
    text encoder runs, "cpu" or "ranks". tiles: of the VAE, "whole" or "published". ring_exchange, overlap: as in
    ParallelSpec. packed: whether weights stay in the blocks of their files where they can."""

    plan: Plan
    fsdp: bool = False
    experts: str = "resident"
    encoder: str = "cpu"
    tiles: str = "whole"
    ring_exchange: str = "rotate"
    overlap: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Machine:
    """What all ranks have. kind: "npu", "cuda" or "cpu". card: a product line, such as "a2" or "h100"; "cpu".

    ranks: on all hosts. device_memory: bytes that a rank may take of its device, for weights and all else; on a CPU,
    its part of the host's. host_memory: bytes that all ranks of a host together may take of it. Of several devices and
    hosts, that of the one with the least. communicator: the bytes of a device that each communicator takes outside of
    torch. hosts: the number of each rank's host; empty: there is one. link: between hosts.
    """

    kind: str
    card: str
    ranks: int
    device_memory: int
    host_memory: int
    communicator: int = 0
    hosts: tuple[int, ...] = ()
    link: MachineLink | None = None

    @property
    def host_ranks(self) -> int:
        """The ranks on the host that has the most."""
        return max(map(self.hosts.count, self.hosts), default=self.ranks)

    @property
    def host_count(self) -> int:
        return len(set(self.hosts)) or 1


class Between(NamedTuple):
    """What a machine sends to others in a step, in bytes, and the seconds of it."""

    sent: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of each stage, by stage ("encode", "denoise", "decode") and by what takes them. device: of the
    rank that takes the most. host: of all ranks of a host together, of the one with the most ranks."""

    device: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]

    @property
    def device_peak(self) -> int:
        return max(sum(parts.values()) for parts in self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Prediction:
    """seconds: by stage: "load", "encode", "denoise", "decode". sent: bytes that a rank sends in a step, by mesh axis,
    and "fsdp". read: bytes of all files. between: machines."""

    arrangement: Arrangement
    seconds: Mapping[str, float]
    memory: Memory
    sent: Mapping[str, int]
    read: int
    between: Between = Between()

    @property
    def running(self) -> float:
        """Seconds of a job whose weights are loaded."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != "load")
