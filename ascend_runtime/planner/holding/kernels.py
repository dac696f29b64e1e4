"""What the kernels of each kind of device allocate besides the tensors that they return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ...ops import PlainOperators


class Margins(NamedTuple):
    """What kernels take besides tensors. blocks: a factor on what a pass takes. decode, encode: factors on what a VAE's
    tiles take. libraries: bytes that libraries keep from their first use on, such as MKL's and Gloo's buffers."""

    blocks: float
    decode: float
    encode: float
    libraries: int = 0


# CPU: measured (tests/ranks/test_planned_memory.py), on ranks whose malloc returns what is freed. Cards: not measured;
# their passes are predicted with torch's own operators, of which a card's fused ones take less.
MARGINS = {
    "cpu": Margins(1.03, 1.06, 1.0, 8 * 2**20),  # encoders never touch all pages of the tensors that they allocate
    "npu": Margins(1.1, 1.2, 1.2),
    "cuda": Margins(1.1, 1.2, 1.2),
}


def operators_on(kind: str) -> PlainOperators:
    """Operators for a dry run of a pass on the meta device."""
    from .dry_operators import DryOperators

    return DryOperators()
