"""An NPU's operators, by torch_npu and MindIE SD. Never run on a device: only checked by the contract tests."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import coded_error
from ..hardware import devices
from ..specs import OperatorSpec
from . import ascend_attention, card_rules
from .card_rules import HALVES
from .libraries import mindiesd, torch_npu
from .mxfp8 import MX_GROUP
from .packing import int4_pairs
from .plain import PlainOperators, RotaryTable, SparsePattern, log_once, warn_once
from .precision import NORMS, RESIDUAL, ROTARY
from .quantization import Static

# Attention -> the operator that decides which cards and dtypes it supports. "fastest" tries npu_fusion_attention too.
OPERATOR_OF = {
    "infer": "npu_fused_infer_attention_score", "fused": "npu_fusion_attention", "fastest": "npu_fusion_attention",
    "laser": "la", "fp8": "npu_fused_infer_attention_score_v2",
}  # fmt: skip
# The output of one call of npu_mm_all_reduce_base. Its page warns of memory and time-outs with long sequences and gives
# no number; this is below the 200 MB of HCCL's own buffer (HCCL_BUFFSIZE), which every exchange goes through.
REDUCED_BYTES = 128 * 2**20
FUSED_ALL_REDUCE_VARIABLE = "ASCEND_RUNTIME_FUSED_ALL_REDUCE"
FRACTAL_NZ = 29  # a format of blocks of 16 x 32


class AscendOperators(PlainOperators):
    """See `PlainOperators` for the methods."""

    npu = True

    def __init__(self, device: torch.device, spec: OperatorSpec, dtype: torch.dtype):
        self.card = devices.card(device)
        if self.card is None and device.type == "npu":
            log_once("This NPU's product line is unknown: operators are used that any known card supports.")
        self.fused_norms = spec.layer_norm != "fp32"
        self._fused_all_reduce = _wants_fused_all_reduce(spec)
        self._dtype = dtype
        mindiesd()  # logs a missing library now, not in the middle of a job
        super().__init__(spec)
        self._attention = self._supported(spec.attention)
        self._self_attention, self._other_attention = self._attentions(self._attention)

    def _check(self, spec: OperatorSpec) -> None:
        if spec.attention in ("laser", "infer", "fastest", "fp8") and self._dtype not in HALVES:
            raise coded_error(
                "AV-1412",
                f"attention is {spec.attention!r}, which supports bfloat16 and float16, but the model's dtype is "
                f"{str(self._dtype).removeprefix('torch.')}. Set dtype to one of these, or attention to 'auto'.",
            )
        if spec.attention in ("laser", "fastest") and mindiesd() is None:
            raise coded_error(
                "AV-1417",
                f"attention is {spec.attention!r}, which needs MindIE SD, but mindiesd cannot be imported. Install the "
                "mindiesd that fits this torch, or set attention to 'auto'.",
            )
        if spec.attention in ("laser", "infer", "fp8"):
            dtype = torch.float8_e4m3fn if spec.attention == "fp8" else self._dtype
            advice = f"Set attention to 'auto' instead of {spec.attention!r}."
            card_rules.require_operator(self.card, OPERATOR_OF[spec.attention], dtype, advice)

    # Attention

    def _supported(self, name: str) -> str:
        """The attention to use: `name`, or for "auto" the first of infer, fused and plain that the card supports. fused
        and fastest, which saved workflows and ALGO=0 may ask for, become "auto" on a card without fused's operator."""

        def able(way: str) -> bool:
            return way == "plain" or card_rules.supports(self.card, OPERATOR_OF[way], self._dtype)

        if name != "auto" and able(name):
            return name
        chosen = next(filter(able, ("infer", "fused", "plain")))
        if name != "auto":
            warn_once(
                f"attention is {name!r}, which uses npu_fusion_attention. The documentation of this operator for "
                f"training does not name cards of {card_rules.SERIES[self.card]}: {chosen!r} is used instead. To avoid "
                f"this warning, set attention to 'auto'{' and do not set ALGO to 0' if name == 'fused' else ''}."
            )
        elif chosen == "plain":
            log_once(
                f"No attention operator of an NPU takes {str(self._dtype).removeprefix('torch.')} on this card: "
                "basic operators compute attention, which is slow. Set dtype to 'auto', which is bfloat16, to use one."
            )
        return chosen

    def _attentions(self, name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """(self-attention, attention to another sequence)"""
        if name == "plain":
            return (lambda *qkv: PlainOperators._attend(self, *qkv)[0],) * 2
        attend = getattr(ascend_attention, name)
        return attend, ascend_attention.infer if name == "fp8" else attend

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        attend = self._self_attention if query.shape == key.shape else self._other_attention
        return (attend(query, key, value),)

    def _attend_with_lse(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._attention == "plain":
            return super()._attend_with_lse(query, key, value)
        if self._attention in ("laser", "fastest", "fp8"):
            log_once(f"attention is {self._attention!r}, which does not return the log-sum-exp: a ring uses 'infer'.")
        if query.dtype in HALVES:
            return ascend_attention.infer_with_lse(query, key, value)
        return ascend_attention.fused_with_lse(query, key, value)

    def sparse_pattern(self, mask: Tensor) -> SparsePattern:
        return (mask.to(torch.int8),) if self.card == "a5" else ascend_attention.chosen_blocks(mask)

    def sparse_attention(self, query: Tensor, key: Tensor, value: Tensor, pattern: SparsePattern) -> Tensor:
        compute = ascend_attention.block_sparse_by_mask if self.card == "a5" else ascend_attention.block_sparse
        return compute(query, key, value, *pattern)

    def check_sparse(self) -> None:
        if mindiesd() is None:
            raise coded_error(
                "AV-1417",
                "RainFusion needs MindIE SD's operator, but mindiesd cannot be imported. Install the mindiesd that "
                "fits this torch. Or turn RainFusion off; AttentionCache, the block cache and the step caches work "
                "without it.",
            )
        if self._dtype not in HALVES:
            raise coded_error(
                "AV-1412",
                "RainFusion's operator supports bfloat16 and float16, but the model's dtype is "
                f"{str(self._dtype).removeprefix('torch.')}. Set dtype to one of these.",
            )

    # Norms

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch_npu().npu_rms_norm(x, weight.type_as(x), epsilon=eps)[0]

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if not self.fused_norms:
            return super().layer_norm(x, weight, bias, eps)
        return _layer_norm(x, weight, bias, eps)

    def modulated_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        if not self.fused_norms:
            return super().modulated_layer_norm(x, shift, scale, eps)
        if scale.shape[:2] == (1, 1):  # one video, one timestep: the modulation fits the norm's own weight and bias
            return _layer_norm(x, (1 + scale).flatten(), shift.flatten(), eps)
        scale, shift = scale.type_as(x), shift.type_as(x)
        if mindiesd() is not None:
            return mindiesd().layernorm_scale_shift(_bare_layer_norm(x.shape[-1], eps), x, scale, shift, fused=True)
        return torch.addcmul(shift, _layer_norm(x, None, None, eps), 1 + scale)

    def gated_add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, update, gate.to(RESIDUAL.npu_dtype or x.dtype))

    # Rotary position embedding

    def rotary_table(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        dtype = ROTARY.npu_dtype or self._dtype  # the operator takes tables of x's dtype only
        return cos.to(dtype), sin.to(dtype)

    def rotary(self, x: Tensor, table: RotaryTable) -> Tensor:
        videos = x.split(max(1, card_rules.ROTARY_LANES // x.shape[2]))
        rotated = [torch_npu().npu_rotary_mul(video, *table, "interleave") for video in videos]
        return rotated[0] if len(rotated) == 1 else torch.cat(rotated)

    # Linear

    def gelu(self, x: Tensor) -> Tensor:
        return torch_npu().npu_gelu(x, approximate="tanh")

    def linear_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        """The bias is added afterwards, as each rank of the fused operator would add it."""
        if not (self._fused_all_reduce and self._can_fuse_all_reduce(x, group)):
            return super().linear_all_reduce(x, weight, bias, group)
        communicator, count = _communicator(group), max(1, REDUCED_BYTES // (weight.shape[0] * x.element_size()))
        parts = [
            torch_npu().npu_mm_all_reduce_base(rows, weight.t(), communicator, reduce_op="sum")
            for rows in x.flatten(0, -2).contiguous().split(count)
        ]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def _can_fuse_all_reduce(self, x: Tensor, group: dist.ProcessGroup) -> bool:
        known = self.card is not None and card_rules.supports(self.card, "npu_mm_all_reduce_base", x.dtype)
        if known and dist.get_world_size(group) in card_rules.REDUCING_RANKS:
            return True
        log_once("The fused all-reduce needs A2 cards, bfloat16 or float16, and a tp_degree of 2, 4 or 8: product and "
                 "all-reduce are separate.")  # fmt: skip
        return False

    # Quantized linear layers. Products are scaled, in a 16-bit dtype, which `check_card_quantized` ensures

    def quantized_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None = None
    ) -> Tensor:
        rows, row_scale = torch_npu().npu_dynamic_quant(x.flatten(0, -2), smooth_scales=smooth)
        return self._products(rows, row_scale, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)

    def int4_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, smooth: Tensor | None = None
    ) -> Tensor:
        tokens = x.flatten(0, -2)
        rows, row_scale = torch_npu().npu_dynamic_quant(tokens, smooth_scales=smooth, dst_type=torch.quint4x2)
        out = self._int32_products(rows, row_scale, weight, scale, x.dtype).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def _static_rows(self, tokens: Tensor, static: Static) -> Tensor:
        scale = static.input_scale.expand(tokens.shape[1])  # the operator expects one for each channel
        offset = static.input_offset.to(torch.int8).expand(tokens.shape[1])
        return torch_npu().npu_quantize(tokens.float(), scale, offset, torch.qint8, -1)

    def _products(
        self, rows: Tensor, row_scale: Tensor | None, weight: Tensor, scale: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        row_scale = None if row_scale is None else row_scale.flatten()
        return torch_npu().npu_quant_matmul(
            rows, weight.t(), scale, pertoken_scale=row_scale, bias=bias, output_dtype=dtype
        )

    def _int4_products(
        self, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return self._int32_products(int4_pairs(rows).view(torch.int32), row_scale, weight, scale, dtype)

    def _int32_products(
        self, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Products of 4-bit values, eight in each int32 of rows [M, K/8]. By its page, the operator adds no bias to
        them."""
        return self._products(rows, row_scale, weight.view(torch.int32), scale, None, dtype)

    def _mx_products(self, x: Tensor, weight: Tensor, exponents: Tensor, bias: Tensor | None) -> Tensor:
        rows, row_exponents = torch_npu().npu_dynamic_mx_quant(x, dst_type=weight.dtype)
        if exponents.shape[1] % 2:  # the operator takes pairs of groups
            exponents = F.pad(exponents, (0, 1))
        pairs, e8m0 = exponents.unflatten(-1, (-1, 2)).transpose(0, 1), torch_npu().float8_e8m0fnu
        return torch_npu().npu_quant_matmul(
            rows, weight.t(), pairs, pertoken_scale=row_exponents, bias=bias, output_dtype=x.dtype,
            scale_dtype=e8m0, pertoken_scale_dtype=e8m0, group_sizes=[1, 1, MX_GROUP],
        )  # fmt: skip


def _wants_fused_all_reduce(spec: OperatorSpec) -> bool:
    flag = os.environ.get(FUSED_ALL_REDUCE_VARIABLE) or "0"
    if flag not in ("0", "1"):
        raise ValueError(
            f"{FUSED_ALL_REDUCE_VARIABLE} is {flag!r}; it can be 1 (matrix product and all-reduce of tensor "
            "parallelism by one operator, on A2 cards) or 0. Unset it for 0."
        )
    return spec.fused_all_reduce or flag == "1"


def in_fractal_nz(weight: Tensor) -> Tensor:
    """An int8 weight [N, K] whose memory is laid out for npu_quant_matmul: as FRACTAL_NZ of [K, N], which its page
    recommends for A2 and A3 cards; for a weight of one row or column there is no such format. Such a tensor must not be
    written to."""
    card = devices.card(weight.device)
    if card is None or min(weight.shape) == 1 or weight.dtype not in card_rules.NZ_WEIGHTS[card].dtypes:
        return weight
    with devices.internal_formats():
        return torch_npu().npu_format_cast(weight.t().contiguous(), FRACTAL_NZ).t()


def check_card_quantized(device: torch.device, dtype: torch.dtype, formats: Iterable[str]) -> None:
    """Raises ValueError for a card, or a dtype of the blocks, that does not support linear layers in these formats."""
    for name in formats:
        card_rules.require_format(devices.card(device), name)
    if dtype not in HALVES:
        raise coded_error(
            "AV-1412",
            f"An NPU's quantized linear layers return bfloat16 or float16, but the model's dtype is "
            f"{str(dtype).removeprefix('torch.')}. Set dtype to 'auto', or to one of these.",
        )


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """By aclnnLayerNorm, to which torch_npu maps torch's own (op-plugin, LayerNormKernelNpuOpApi.cpp), on all cards.

    npu_layer_norm_eval, of which op-plugin's page says that it is to go, copies weight and bias at every call.
    """
    dtype = NORMS.npu_dtype or x.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)


@lru_cache(maxsize=8)
def _bare_layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    """A module without parameters that carries dim and eps."""
    return nn.LayerNorm(dim, eps, elementwise_affine=False)


def _communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of `group` on this rank. It takes the global rank, to find this rank's card."""
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())
