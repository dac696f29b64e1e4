"""What a dry run is asked, and what it answers: a network, a video, a rank, and the bytes of a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...models.family import Family
from ...specs import Plan


class PassBytes(NamedTuple):
    """context: what embedders, keys and values of the text and rotary tables leave until the last pass, of all
    branches. blocks: what a pass takes besides at its peak. exchange: the buffers of exchanges at that time. output:
    of one block's output."""

    context: int
    blocks: int
    exchange: int
    output: int


@dataclass(frozen=True)
class DryNetwork:
    """A transformer on one of `tp` ranks. config: in JSON. in_8_bits: the layers that are quantized. packed: those that
    stay in blocks, with the types of these."""

    family: Family
    config: str
    dtype: str
    in_8_bits: frozenset[str]
    tp: int
    packed: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class DryVideo:
    """size: of the latent [B,C,T,H,W]. branches: of guidance, that this rank computes in a step."""

    size: tuple[int, ...]
    text_tokens: int
    per_token: bool
    branches: int


@dataclass(frozen=True)
class DryRank:
    """kind: of its device."""

    kind: str
    plan: Plan
    number: int
    ring_exchange: str
    overlap: bool
