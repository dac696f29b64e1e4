"""An NPU's operators, by torch_npu and MindIE SD. Never run on a device: only checked by the contract tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..hardware import devices
from ..specs import OperatorSpec
from . import ascend_attention
from .ascend_attention import HALVES
from .libraries import mindiesd, torch_npu
from .plain import PlainOperators, RotaryTable, log_once
from .precision import NORMS, RESIDUAL, ROTARY
from .quantization import Static

ROTARY_LANES = 999  # the maximum of batch x heads for npu_rotary_mul with interleaved pairs
LACKING = {"duo": ("laser", "infer"), "a5": ("laser",)}  # unsupported attentions, by card
CARD_NAMES = {"duo": "a 300I Duo", "a5": "a card of the 950 series"}
REDUCING_RANKS = (2, 4, 8)  # group sizes that npu_mm_all_reduce_base supports


class AscendOperators(PlainOperators):
    """See `PlainOperators` for the methods."""

    npu = True

    def __init__(self, device: torch.device, spec: OperatorSpec, dtype: torch.dtype):
        self.card = devices.card(device)
        self.fused_norms = spec.layer_norm != "fp32"
        self._dtype = dtype
        self._attention = spec.attention
        mindiesd()  # logs a missing library now, not in the middle of a job
        super().__init__(spec)
        self._self_attention, self._other_attention = self._attentions(spec.attention)

    def _check(self, spec: OperatorSpec) -> None:
        if spec.attention in ("laser", "infer", "fastest", "fp8") and self._dtype not in HALVES:
            raise ValueError(
                f"attention is {spec.attention!r}, which supports bfloat16 and float16, but the model's dtype is "
                f"{str(self._dtype).removeprefix('torch.')}. Set dtype to one of these, or attention to 'fused'."
            )
        if spec.attention in ("laser", "fastest") and mindiesd() is None:
            raise ValueError(
                f"attention is {spec.attention!r}, which needs MindIE SD, but mindiesd cannot be imported. Install the "
                "mindiesd that fits this torch, or set attention to 'fused'."
            )
        if spec.attention == "fp8" and self.card != "a5":
            raise ValueError(
                f"attention is 'fp8', which only cards of the 950 series support; this card is "
                f"{self.card or 'unknown'}. Set it to 'fused', 'laser' or 'infer'."
            )
        if self.card in LACKING and spec.attention in LACKING[self.card]:
            name = CARD_NAMES[self.card]
            raise ValueError(f"attention is {spec.attention!r}, which {name} does not support. Set it to 'fused'.")
        if self.card == "duo" and self._dtype == torch.bfloat16:
            raise ValueError("dtype is bfloat16, which a 300I Duo does not support. Set it to 'auto' or 'float16'.")

    # Attention

    def _attentions(self, name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """(self-attention, attention to another sequence)"""
        fused = ascend_attention.prompt if self.card == "duo" else ascend_attention.fused
        if name == "plain":
            return (lambda *qkv: PlainOperators._attend(self, *qkv)[0],) * 2
        if name == "fp8":
            return ascend_attention.fp8, fused
        return (getattr(ascend_attention, name) if name in ("infer", "laser", "fastest") else fused,) * 2

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        attend = self._self_attention if query.shape == key.shape else self._other_attention
        return (attend(query, key, value),)

    def _attend_with_lse(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._attention == "plain" or self.card == "duo":  # a 300I Duo's operators do not return the LSE
            return super()._attend_with_lse(query, key, value)
        if self._attention in ("laser", "fastest", "fp8"):
            log_once(f"attention is {self._attention!r}, which does not return the log-sum-exp: a ring uses 'infer'.")
        if query.dtype in HALVES:
            return ascend_attention.infer_with_lse(query, key, value)
        return ascend_attention.fused_with_lse(query, key, value)

    def sparse_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        compute = ascend_attention.block_sparse_by_mask if self.card == "a5" else ascend_attention.block_sparse
        return compute(query, key, value, mask)

    def check_sparse(self) -> None:
        advice = "Turn RainFusion off; AttentionCache, the block cache and the step caches work without it."
        if self.card == "duo":
            raise ValueError(f"A 300I Duo has no operator for sparse attention. {advice}")
        if mindiesd() is None:
            raise ValueError(
                "RainFusion needs MindIE SD's operator, but mindiesd cannot be imported. Install the mindiesd that "
                f"fits this torch. Or {advice[0].lower()}{advice[1:]}"
            )
        if self._dtype not in HALVES:
            raise ValueError(
                "RainFusion's operator supports bfloat16 and float16, but the model's dtype is "
                f"{str(self._dtype).removeprefix('torch.')}. Set dtype to one of these."
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
        if mindiesd() is not None and self.card != "duo":
            return mindiesd().layernorm_scale_shift(_bare_layer_norm(x.shape[-1], eps), x, scale, shift, fused=True)
        return torch.addcmul(shift, _layer_norm(x, None, None, eps), 1 + scale)

    def gated_add(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, update, gate.to(RESIDUAL.npu_dtype or x.dtype))

    # Rotary position embedding

    def rotary_table(self, cos: Tensor, sin: Tensor) -> RotaryTable:
        if self.card == "duo":  # its npu_rotary_mul does not rotate interleaved pairs
            return super().rotary_table(cos, sin)
        return cos.to(ROTARY.npu_dtype), sin.to(ROTARY.npu_dtype)

    def rotary(self, x: Tensor, table: RotaryTable) -> Tensor:
        if self.card == "duo":
            return super().rotary(x, table)
        videos = x.to(ROTARY.npu_dtype).split(max(1, ROTARY_LANES // x.shape[2]))
        rotated = [torch_npu().npu_rotary_mul(video, *table, "interleave") for video in videos]
        return (rotated[0] if len(rotated) == 1 else torch.cat(rotated)).type_as(x)

    # Linear

    def gelu(self, x: Tensor) -> Tensor:
        return torch_npu().npu_gelu(x, approximate="tanh")

    def linear_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        """The fused operator is documented only for A2 cards. The bias is added afterwards, as each rank would add
        it."""
        if self.card != "a2" or x.dtype not in HALVES or dist.get_world_size(group) not in REDUCING_RANKS:
            return super().linear_all_reduce(x, weight, bias, group)
        communicator = _communicator(group)
        out = torch_npu().npu_mm_all_reduce_base(x.contiguous(), weight.t(), communicator, reduce_op="sum")
        return out if bias is None else out + bias

    # Linear in 8 bits. Products are scaled, in a 16-bit dtype, which `check_card_quantized` ensures

    def quantized_linear(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows, row_scale = torch_npu().npu_dynamic_quant(x.flatten(0, -2))
        return self._products(rows, row_scale, weight, scale, bias, x.dtype).view(*x.shape[:-1], -1)

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


def check_card_quantized(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for a card, or a dtype of the blocks, that does not support W8A8 linear layers."""
    if devices.card(device) == "duo":
        raise ValueError(
            "W8A8 linear layers with one scale for each token are supported by cards of the A2, A3 and 950 series; "
            "this is a 300I Duo. Load the model's floating-point files, with quantization 'none'."
        )
    if dtype not in HALVES:
        raise ValueError(
            f"An NPU's W8A8 linear layers return bfloat16 or float16, but the model's dtype is "
            f"{str(dtype).removeprefix('torch.')}. Set dtype to 'auto', or to one of these."
        )


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dtype = NORMS.npu_dtype or x.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return torch_npu().npu_layer_norm_eval(x.to(dtype), x.shape[-1:], weight, bias, eps)


@lru_cache(maxsize=8)
def _bare_layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    """A module without parameters that carries dim and eps."""
    return nn.LayerNorm(dim, eps, elementwise_affine=False)


def _communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of `group` on this rank. It takes the global rank, to find this rank's card."""
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())
