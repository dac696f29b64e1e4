"""Dequantizes the blocks of GGUF files on any device.

The layouts are those of ggml's structures (ggml-org/ggml, src/ggml-common.h). In all of them, `d` is the block's scale
in fp16, and a row of a matrix is a row of blocks. 4-bit values of a block's first half lie in the lower halves of
bytes, those of its second half in the upper ones; in blocks of 256, this holds for each 64 values.

    Q4_0, Q5_0, Q8_0    32 values:  d q, of 4, 5 and 8 bits with a sign
    Q4_1, Q5_1          32 values:  d q + m
    Q2_K, Q4_K, Q5_K    256 values: d s q - dmin t, with one s and t of 4 bits for 16 values, of 6 bits for 32 values
    Q3_K, Q6_K          256 values: d s q, with one s of 6 and of 8 bits for 16 values
    IQ4_NL              32 values:  d table[q], of 4 bits
    IQ4_XS              256 values: d s table[q], with one s of 6 bits for 32 values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**22  # values, so that what is computed in fp32 takes little memory next to a layer's weight
# The values of IQ4_NL and IQ4_XS (kvalues_iq4nl in ggml-common.h).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """How the weights of a layer lie in memory as bytes (see ops.packing.Packing).

    name: as ggml has it. values, nbytes: of a block. scales: where its fp16 numbers begin. decode: makes fp32
    [n, values] of blocks uint8 [n, nbytes].
    """

    name: str
    values: int
    nbytes: int
    scales: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the bytes, given that of the values."""
        return (*stored[:-1], stored[-1] // self.values * self.nbytes)

    def stored(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """The values that this part of the bytes holds."""
        *rows, last = part
        return *rows, slice(*(edge // self.nbytes * self.values for edge in (last.start, last.stop)))

    def packed(self, tensor: Tensor) -> Tensor:
        """The bytes. Raises ValueError for scales that are not finite."""
        blocks = tensor.reshape(-1, self.nbytes)
        if not all(_halves(blocks[:, begin : begin + 2]).isfinite().all() for begin in self.scales):
            raise ValueError("NaN or infinite scales")
        return tensor


def dequantized(blocks: Tensor, kind: BlockType, dtype: torch.dtype) -> Tensor:
    """A matrix [rows, columns] in `dtype` of its blocks uint8 [rows, bytes]; computed in fp32, some rows at a time."""
    rows, columns = blocks.shape[0], blocks.shape[1] // kind.nbytes * kind.values
    made = torch.empty(rows, columns, dtype=dtype, device=blocks.device)
    step = max(1, AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        some = blocks[start : start + step]
        made[start : start + step].copy_(kind.decode(some.reshape(-1, kind.nbytes)).view(len(some), columns))
    return made


def _shifted(x: Tensor, bits: int) -> Tensor:
    """uint8 `x`, shifted to the right. By operators that all devices have, which shifts are not."""
    return torch.div(x, 1 << bits, rounding_mode="floor") if bits else x


def _fields(x: Tensor, bits: int) -> Tensor:
    """The numbers of so many bits in bytes [n, groups, k], the lowest ones first: [n, groups * (8 // bits) * k]."""
    parts = [_shifted(x, shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -2).flatten(1)


def _halves(x: Tensor) -> Tensor:
    """fp32 [n, k] of the bytes of fp16 numbers, [n, 2 k]."""
    return x.contiguous().view(torch.float16).float()


def _bits(x: Tensor) -> Tensor:
    """The bits of bytes [n, k] in order, the lowest of a byte first: uint8 [n, 8 k]."""
    return torch.stack([_shifted(x, shift) & 1 for shift in range(8)], -1).flatten(1)


def _signed(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int8).float()


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Groups of values [n, all], each with one of the scales [n, groups]."""
    return (values.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def _q4_0(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * (_fields(x[:, None, 2:], 4).float() - 8)


def _q4_1(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * _fields(x[:, None, 4:], 4).float() + _halves(x[:, 2:4])


def _q5_0(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * ((_fields(x[:, None, 6:], 4) + 16 * _bits(x[:, 2:6])).float() - 16)


def _q5_1(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * (_fields(x[:, None, 8:], 4) + 16 * _bits(x[:, 4:8])).float() + _halves(x[:, 2:4])


def _q8_0(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * _signed(x[:, 2:])


def _q2_k(x: Tensor) -> Tensor:
    """scales [16] | q [64] | d | dmin"""
    scales, d, dmin = x[:, :16], _halves(x[:, 80:82]), _halves(x[:, 82:84])
    q = _fields(x[:, 16:80].unflatten(1, (2, 32)), 2).float().unflatten(1, (16, 16))
    less = (dmin * _shifted(scales, 4).float())[..., None]
    return (q * (d * (scales & 15).float())[..., None] - less).flatten(1)


def _q3_k(x: Tensor) -> Tensor:
    """A third bit of each value [32] | q [64] | scales [12] | d. Values without the third bit are 4 less."""
    low, high = _fields(x[:, None, 96:104], 4), _fields(x[:, None, 104:108], 2)
    q = _fields(x[:, 32:96].unflatten(1, (2, 32)), 2).float() + 4 * _fields(x[:, None, :32], 1).float() - 4
    return _scaled(q, _halves(x[:, 108:110]) * ((low + 16 * high).float() - 32))


def _scales_of_6_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales s and the 8 scales t in bytes [n, 12]: the first four of s and of t in the lower 6 bits of 4 bytes
    each; the others' lower halves in the last 4 bytes, and their upper bits above the first four."""
    s, t, both = x[:, :4], x[:, 4:8], x[:, 8:]
    s = torch.cat((s & 63, (both & 15) + 16 * _shifted(s, 6)), 1)
    t = torch.cat((t & 63, _shifted(both, 4) + 16 * _shifted(t, 6)), 1)
    return s.float(), t.float()


def _with_offsets(x: Tensor, q: Tensor) -> Tensor:
    """d | dmin | scales [12] | ..., for the values q [n, 256]"""
    s, t = _scales_of_6_bits(x[:, 4:16])
    less = (_halves(x[:, 2:4]) * t)[..., None]
    return (q.unflatten(1, (8, 32)) * (_halves(x[:, :2]) * s)[..., None] - less).flatten(1)


def _q4_k(x: Tensor) -> Tensor:
    return _with_offsets(x, _fields(x[:, 16:].unflatten(1, (4, 32)), 4).float())


def _q5_k(x: Tensor) -> Tensor:
    """... a fifth bit of each value [32] | q [128]"""
    fifth = _fields(x[:, None, 16:48], 1)
    return _with_offsets(x, (_fields(x[:, 48:].unflatten(1, (4, 32)), 4) + 16 * fifth).float())


def _q6_k(x: Tensor) -> Tensor:
    """Lower 4 bits [128] | upper 2 bits [64] | scales [16] | d"""
    low, high = _fields(x[:, :128].unflatten(1, (2, 64)), 4), _fields(x[:, 128:192].unflatten(1, (2, 32)), 2)
    return _scaled((low + 16 * high).float() - 32, _halves(x[:, 208:210]) * _signed(x[:, 192:208]))


def _from_table(q: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=q.device)
    return table.index_select(0, q.flatten().int()).view(q.shape)


def _iq4_nl(x: Tensor) -> Tensor:
    return _halves(x[:, :2]) * _from_table(_fields(x[:, None, 2:], 4))


def _iq4_xs(x: Tensor) -> Tensor:
    """d | upper bits of scales [2] | lower bits of scales [4] | q [128]"""
    low = torch.stack((x[:, 4:8] & 15, _shifted(x[:, 4:8], 4)), -1).flatten(1)
    high = torch.stack([_shifted(x[:, 2:4], shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
    q = _from_table(_fields(x[:, 8:].unflatten(1, (8, 16)), 4))
    return _scaled(q, _halves(x[:, :2]) * ((low + 16 * high).float() - 32))


BLOCK_TYPES = {
    one.name: one
    for one in (
        BlockType("Q4_0", 32, 18, (0,), _q4_0), BlockType("Q4_1", 32, 20, (0, 2), _q4_1),
        BlockType("Q5_0", 32, 22, (0,), _q5_0), BlockType("Q5_1", 32, 24, (0, 2), _q5_1),
        BlockType("Q8_0", 32, 34, (0,), _q8_0), BlockType("Q2_K", 256, 84, (80, 82), _q2_k),
        BlockType("Q3_K", 256, 110, (108,), _q3_k), BlockType("Q4_K", 256, 144, (0, 2), _q4_k),
        BlockType("Q5_K", 256, 176, (0, 2), _q5_k), BlockType("Q6_K", 256, 210, (208,), _q6_k),
        BlockType("IQ4_NL", 32, 18, (0,), _iq4_nl), BlockType("IQ4_XS", 256, 136, (0,), _iq4_xs),
    )
}  # fmt: skip
