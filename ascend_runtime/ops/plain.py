"""Operators in plain torch: for CPU and CUDA, and where an NPU has no better ones."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import coded_error
from ..hardware import devices
from ..specs import OperatorSpec
from . import card_rules, sparse
from .mxfp8 import mx_products
from .packing import INT4_MAX, int4_values
from .precision import LOG_SUM_EXP, MODULATION, NORMS, RESIDUAL, ROTARY
from .quantization import Static, quantized_rows, row_largest, scaled_products, smoothed, statically_quantized

logger = logging.getLogger(__name__)

RotaryTable = tuple[Tensor, ...]
SparsePattern = tuple[Tensor, ...]
SCORES = 2**27  # attention scores that `explicit_attention` computes at once: 512 MiB in fp32


class PlainOperators:
    """One method for each operator. spec: as in `operators_for`.

    Attention takes query [B, S, heads, head_dim], key and value [B, L, heads, head_dim], and scales by
    1 / sqrt(head_dim).
    """

    npu = False

    def __init__(self, spec: OperatorSpec = OperatorSpec()):
        self.heads_per_call = spec.heads_per_call
        self._check(spec)

    def _check(self, spec: OperatorSpec) -> None:
        if spec.attention == "fp8":
            raise coded_error(
                "AV-1417",
                "attention is 'fp8', which only NPUs of the 950 series support. Set it to 'auto' for attention in the "
                "dtype of the blocks.",
            )
        if spec.attention not in ("auto", "plain", "fused"):
            log_once(f"attention {spec.attention!r} is only available on NPUs; torch's attention is used instead.")
        if spec.fused_all_reduce:
            log_once("fused_all_reduce is only available on A2 cards: product and all-reduce are separate.")

    # Attention

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(q k^T) v, with query's shape."""
        return self._by_heads(self._attend, query, key, value)[0]

    def attention_with_lse(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(attention, log-sum-exp of each row [B, S, heads] in fp32), to merge partial attentions."""
        out, lse = self._by_heads(self._attend_with_lse, query, key, value)
        return out, lse

    def _by_heads(self, attend: Callable[..., tuple[Tensor, ...]], *qkv: Tensor) -> tuple[Tensor, ...]:
        """`attend` on at most `heads_per_call` heads at once."""
        if not 0 < self.heads_per_call < qkv[0].shape[2]:
            return attend(*qkv)
        parts = [attend(*heads) for heads in zip(*(x.split(self.heads_per_call, dim=2) for x in qkv))]
        return tuple(torch.cat(results, dim=2) for results in zip(*parts))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not _has_torchs_attention(query):
            return self._attend_with_lse(query, key, value)[:1]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return (F.scaled_dot_product_attention(query, key, value).transpose(1, 2),)

    def _attend_with_lse(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """By the kernels of scaled_dot_product_attention, which itself does not return the log-sum-exp."""
        length = query.shape[1]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if query.device.type == "npu":  # has none of these kernels
            out, lse = explicit_attention(query, key, value)
        elif query.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        elif query.dtype == torch.float32:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        else:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        return out.transpose(1, 2), lse[:, :, :length].transpose(1, 2).to(LOG_SUM_EXP.dtype)

    def sparse_pattern(self, mask: Tensor) -> SparsePattern:
        """A mask [B, heads, blocks, blocks] in the form that `sparse_attention` takes. It is true for the mask blocks
        (`sparse.BLOCK` queries by `sparse.BLOCK` keys) that are computed; every row has at least one."""
        return (mask,)

    def sparse_attention(self, query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern) -> Tensor:
        """Attention of [B, heads, S, head_dim], restricted to the mask blocks of `pattern`."""
        compute = sparse.flex if query.device.type == "cuda" else sparse.gathered
        return compute(query, key, value, *pattern)

    def check_sparse(self) -> None:
        """Raises ValueError if `sparse_attention` is not supported."""

    # Norms

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dim [..., D]."""
        return F.rms_norm(x, weight.shape, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last dim [..., D]."""
        dtype = NORMS.dtype
        return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).type_as(x)

    def modulated_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """layer_norm(x) * (1 + scale) + shift; x [B, S, D], shift and scale [B, 1 or S, D] in fp32."""
        normed = F.layer_norm(x.to(NORMS.dtype), x.shape[-1:], eps=eps)
        return torch.addcmul(shift, normed, 1 + scale).type_as(x)

    def gated_add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """x + update * gate; x and update [B, S, D], gate [B, 1 or S, D] in fp32."""
        return torch.addcmul(x.to(RESIDUAL.dtype), update.to(RESIDUAL.dtype), gate).type_as(x)

    def modulation(self, table: Tensor, timestep: Tensor) -> Tensor:
        """table + timestep in fp32: a block's shifts, scales and gates."""
        return table.to(MODULATION.dtype) + timestep.to(MODULATION.dtype)

    # Rotary position embedding over interleaved pairs (Su et al., arXiv 2104.09864), as in Wan

    def rotary_table(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        """The tables [1, S, 1, ...] for `rotary`, from cos and sin [1, S, 1, head_dim] with each value repeated
        twice."""
        return cos[..., 0::2].to(ROTARY.dtype).contiguous(), sin[..., 1::2].to(ROTARY.dtype).contiguous()

    def rotary(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Rotates the pairs (x[2i], x[2i+1]) of x [B, S, heads, head_dim] by the angles of `table`.

        Does not use complex numbers, which NPUs lack; as fast as with them on a CPU.
        """
        cos, sin = table
        even, odd = x.to(ROTARY.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = even.new_empty(*even.shape, 2)
        torch.mul(even, cos, out=turned[..., 0]).addcmul_(odd, sin, value=-1)
        torch.mul(even, sin, out=turned[..., 1]).addcmul_(odd, cos)
        return turned.flatten(-2).type_as(x)

    # Linear

    def gelu(self, x: Tensor) -> Tensor:
        """GELU with the tanh approximation."""
        return F.gelu(x, approximate="tanh")

    def linear_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        """x weight^T, all-reduced over `group`, plus bias; x [B, S, K/ranks], weight [N, K/ranks], bias [N]."""
        return self.summed(F.linear(x, weight), bias, group)

    def summed(self, out: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        """The sum of all ranks' `out`, in place, plus the bias."""
        dist.all_reduce(out, group=group)
        return out if bias is None else out + bias

    # Quantized linear layers: weight [N, K] and its scale [N] in fp32; the result has x's dtype. Activations are
    # quantized dynamically, each token by its largest magnitude, after they are multiplied by `smooth` [K] if given

    def quantized_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None = None
    ) -> Tensor:
        """x (scale weight)^T + bias, x [..., K]; weight int8 (see quantization.py)."""
        rows = quantized_rows(smoothed(x, smooth).flatten(0, -2))
        return self._products(*rows, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)

    def quantized_linear_all_reduce(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        """x (scale weight)^T, all-reduced over `group`, plus bias; x [B, S, K/ranks], weight [N, K/ranks].

        A first all-reduce takes the maximum of each token's magnitudes in fp32, so that a token has one scale on all
        ranks, and the integers equal those on one rank.
        """
        return self.summed(self.quantized_linear_part(x, weight, scale, group), bias, group)

    def quantized_linear_part(self, x: Tensor, weight: Tensor, scale: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's summand in `quantized_linear_all_reduce`."""
        rows = quantized_rows(x.flatten(0, -2), self._largest_of_all(x, group))
        return self._products(*rows, weight, scale, None, x.dtype).view(*x.shape[:-1], -1)

    def int4_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None = None
    ) -> Tensor:
        """Like `quantized_linear`, with weight and activations in 4 bits; weight [N, K/2] in pairs (see packing.py)."""
        rows = quantized_rows(smoothed(x, smooth).flatten(0, -2), limit=INT4_MAX)
        out = self._int4_products(*rows, weight, scale, x.dtype).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def int4_linear_all_reduce(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        """Like `quantized_linear_all_reduce`, in 4 bits; weight [N, K/ranks/2] in pairs."""
        return self.summed(self.int4_linear_part(x, weight, scale, group), bias, group)

    def int4_linear_part(self, x: Tensor, weight: Tensor, scale: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's summand in `int4_linear_all_reduce`."""
        rows = quantized_rows(x.flatten(0, -2), self._largest_of_all(x, group), INT4_MAX)
        return self._int4_products(*rows, weight, scale, x.dtype).view(*x.shape[:-1], -1)

    def mx_linear(self, x: Tensor, weight: Tensor, exponents: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias in MXFP8 (see mxfp8.py); x [..., K], weight fp8 [N, K], exponents [N, groups], bias in
        fp32."""
        return self._mx_products(x.flatten(0, -2), weight, exponents, bias).view(*x.shape[:-1], -1)

    def mx_linear_all_reduce(
        self, x: Tensor, weight: Tensor, exponents: Tensor, bias: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        """Like `mx_linear`, all-reduced over `group`; x [B, S, K/ranks], weight [N, K/ranks], in whole groups."""
        out = self.mx_linear(x, weight, exponents, None)
        return self.summed(out, None if bias is None else bias.type_as(out), group)

    def static_linear(self, x: Tensor, weight: Tensor, static: Static) -> Tensor:
        """Like `quantized_linear` in int8, but x [..., K] is quantized with a static scale and offset."""
        rows = self._static_rows(x.flatten(0, -2), static)
        return self._products(rows, None, weight, static.scale, static.bias, x.dtype).view(*x.shape[:-1], -1)

    def static_linear_all_reduce(self, x: Tensor, weight: Tensor, static: Static, group: dist.ProcessGroup) -> Tensor:
        """Like `static_linear`, all-reduced over `group`; x [B, S, K/ranks], weight [N, K/ranks]."""
        out = self.static_linear_part(x, weight, static)
        return self.summed(out, static.added(out.dtype), group)

    def static_linear_part(self, x: Tensor, weight: Tensor, static: Static) -> Tensor:
        """This rank's summand in `static_linear_all_reduce`."""
        rows = self._static_rows(x.flatten(0, -2), static)
        return self._products(rows, None, weight, static.scale, None, x.dtype).view(*x.shape[:-1], -1)

    def _largest_of_all(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The largest magnitude of each whole token [tokens, 1] in fp32; x [..., K/ranks] is this rank's part."""
        largest = row_largest(x)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return largest.flatten(0, -2)

    def _static_rows(self, tokens: Tensor, static: Static) -> Tensor:
        return statically_quantized(tokens, static.input_scale, static.input_offset)

    def _products(
        self, rows: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """See `quantization.scaled_products`."""
        return scaled_products(rows, row_scale, weight, scale, bias, dtype)

    def _int4_products(
        self, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return scaled_products(rows, row_scale, int4_values(weight), scale, None, dtype)

    def _mx_products(self, x: Tensor, weight: Tensor, exponents: Tensor, bias: Tensor | None) -> Tensor:
        """See `mxfp8.mx_products`."""
        return mx_products(x, weight, exponents, bias)


def _has_torchs_attention(query: Tensor) -> bool:
    """On an NPU, torch_npu computes scaled_dot_product_attention by npu_fusion_attention (Ascend/op-plugin,
    ScaledDotProductAttentionKernelNpuOpApi.cpp), which not every card has."""
    if query.device.type != "npu":
        return True
    return card_rules.supports(devices.card(query.device), "npu_fusion_attention", query.dtype)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(attention of [B, heads, S, head_dim], LSE [B, heads, S]) by basic operators in fp32. Slow: computes blocks of
    rows one after the other to save memory."""
    rows = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    key, value = key.float().transpose(-1, -2), value.float()
    outs, sums = [], []
    for block in query.split(rows, dim=2):
        scores = block.float() @ key * query.shape[-1] ** -0.5
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append(((scores - lse).exp() @ value).type_as(query))
        sums.append(lse.squeeze(-1))
    return torch.cat(outs, 2), torch.cat(sums, 2)


@lru_cache(maxsize=None)
def log_once(text: str) -> None:
    logger.info("%s", text)


@lru_cache(maxsize=None)
def warn_once(text: str) -> None:
    logger.warning("%s", text)
