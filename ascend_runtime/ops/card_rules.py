"""What each card can compute and exchange, as the documents of its operators say: data, each with its source.

A card is a product line, as `hardware.devices.card` names it. A row holds, for each of SERIES, the dtypes that the
operator's first tensor may have there, and the document; no dtypes: the card does not support it. To add an operator,
add a row to TORCH_NPU, MINDIE_SD or TORCH; the contract tests fail for a call without one.

The page of a torch_npu function decides. For a card that the page does not name, it is the page of the aclnn operator
that torch_npu calls there. npu_fusion_attention is the exception: its own page is for training, and pages of different
releases disagree about A3, so A3 counts as unsupported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

import torch
from torch import Tensor

from ..errors import coded_error

SERIES = {"a2": "the A2 series", "a3": "the A3 series", "a5": "the 950 series"}

Dtypes = tuple[torch.dtype, ...]
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
FP8 = (torch.float8_e4m3fn,)
NOT: Dtypes = ()


@dataclass(frozen=True)
class Support:
    """What a document says of an operator on one card. dtypes: of its first tensor; empty: not supported."""

    dtypes: Dtypes
    source: str  # "repository, path"


Rule = Mapping[str, Support]  # by card


def _says(source: str, **dtypes: Dtypes) -> dict[str, Support]:
    """One document about several cards."""
    return {card: Support(allowed, source) for card, allowed in dtypes.items()}


def _torch_npu(page: str, **dtypes: Dtypes) -> dict[str, Support]:
    return _says(f"Ascend/op-plugin, docs/zh/custom_APIs/torch_npu/{page}.md", **dtypes)


def _nn(page: str, **dtypes: Dtypes) -> dict[str, Support]:
    return _says(f"hicann/ops-nn, {page}.md", **dtypes)


def _transformer(page: str, **dtypes: Dtypes) -> dict[str, Support]:
    return _says(f"hicann/ops-transformer, {page}.md", **dtypes)


def _mindie(path: str, **dtypes: Dtypes) -> dict[str, Support]:
    return _says(f"Ascend/MindIE-SD, {path}", **dtypes)


_INFER_950 = "attention/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV5"
_LAYER_NORM = _nn("norm/layer_norm_v4/docs/aclnnLayerNorm&aclnnLayerNormWithImplMode", a2=FLOATS, a3=FLOATS, a5=FLOATS)
_ADALN = _nn("norm/ada_layer_norm/docs/aclnnAdaLayerNorm", a2=FLOATS, a3=FLOATS, a5=NOT)
_ADALN_V2 = _nn("norm/ada_layer_norm_v2/docs/aclnnAdaLayerNormV2", a2=FLOATS, a3=FLOATS, a5=FLOATS)
_SPARSE = _transformer("attention/rain_fusion_attention/docs/aclnnRainFusionAttention", a2=HALVES, a3=HALVES, a5=NOT)
# With inner_precise 0 or 1 on A2 and A3, and 4 on the 950 series.
_SPARSE_BY_MASK = _transformer(
    "attention/block_sparse_attention/docs/aclnnBlockSparseAttention", a2=HALVES, a3=HALVES, a5=HALVES
)
_LINEAR = {"a2": FLOATS, "a3": FLOATS, "a5": FLOATS}

TORCH_NPU: dict[str, Rule] = {
    "npu_fusion_attention": _torch_npu("torch_npu-npu_fusion_attention", a2=FLOATS, a3=NOT, a5=FLOATS),
    # What torch_npu makes of torch's scaled_dot_product_attention on A2 and A3; on other cards, npu_fusion_attention.
    "npu_fusion_attention_v3": _torch_npu("torch_npu-npu_fusion_attention_v3", a2=FLOATS, a3=NOT, a5=NOT),
    "npu_fused_infer_attention_score": {
        **_torch_npu("torch_npu-npu_fused_infer_attention_score", a2=HALVES, a3=HALVES),
        **_transformer(_INFER_950, a5=HALVES),
    },
    "npu_fused_infer_attention_score_v2": {
        **_torch_npu("torch_npu-npu_fused_infer_attention_score_v2", a2=HALVES, a3=HALVES),
        **_transformer(_INFER_950, a5=(*HALVES, *FP8)),
    },
    "npu_rms_norm": {
        **_torch_npu("（beta）torch_npu-npu_rms_norm", a2=FLOATS, a3=FLOATS),
        **_nn("norm/rms_norm/docs/aclnnRmsNorm", a5=FLOATS),
    },
    "npu_rotary_mul": {
        **_torch_npu("torch_npu-npu_rotary_mul", a2=FLOATS, a3=FLOATS),
        **_transformer("posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbeddingV2", a5=FLOATS),
    },
    "npu_gelu": {
        **_torch_npu("torch_npu-npu_gelu", a2=FLOATS),
        **_nn("activation/gelu_v2/docs/aclnnGeluV2", a3=FLOATS, a5=FLOATS),
    },
    "npu_fast_gelu": {
        **_torch_npu("torch_npu-npu_fast_gelu", a2=FLOATS, a3=FLOATS),
        **_nn("activation/fast_gelu/docs/aclnnFastGelu", a5=FLOATS),
    },
    "npu_mm_all_reduce_base": _torch_npu("torch_npu-npu_mm_all_reduce_base", a2=(*HALVES, torch.int8), a3=NOT, a5=NOT),
    "npu_dynamic_quant": {
        **_torch_npu("torch_npu-npu_dynamic_quant", a2=HALVES, a3=HALVES),
        **_nn("quant/dynamic_quant/docs/aclnnDynamicQuant", a5=HALVES),
    },
    "npu_quantize": {
        **_torch_npu("torch_npu-npu_quantize", a2=FLOATS, a3=FLOATS),
        **_nn("quant/quantize/docs/aclnnQuantize", a5=FLOATS),
    },
    "npu_quant_matmul": {  # int32: eight values of 4 bits
        **_torch_npu("torch_npu-npu_quant_matmul", a2=(torch.int8, torch.int32), a3=(torch.int8, torch.int32)),
        **_nn("matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5", a5=(torch.int8, *FP8)),
    },
    "npu_format_cast": _torch_npu(  # its page names no dtypes; this is that of the weights
        "（beta）torch_npu-npu_format_cast", a2=(torch.int8,), a3=(torch.int8,), a5=(torch.int8,)
    ),
    "npu_convert_weight_to_int4pack": {
        **_torch_npu("torch_npu-npu_convert_weight_to_int4pack", a2=(torch.int32,), a3=(torch.int32,)),
        **_nn("matmul/convert_weight_to_int4_pack/docs/aclnnConvertWeightToINT4Pack", a5=(torch.int32,)),
    },
    "npu_dynamic_mx_quant": _nn("quant/dynamic_mx_quant/docs/aclnnDynamicMxQuantV2", a2=NOT, a3=NOT, a5=FLOATS),
}

# Its operators, then the functions of mindiesd that call them.
MINDIE_SD: dict[str, Rule] = {
    "la": _mindie("csrc/ops/laser_attention/op_host/laser_attention_def.cpp", a2=HALVES, a3=HALVES, a5=NOT),
    "adaln": _ADALN,
    "adaln_v2": _ADALN_V2,
    "layernorm": _LAYER_NORM,
    "rainfusionattention": _SPARSE,
    "block_sparse_attention": _SPARSE_BY_MASK,
    "attention_forward": _mindie("mindiesd/layers/flash_attn/attention_func.py", a2=HALVES, a3=HALVES, a5=HALVES),
    "layernorm_scale_shift": {**_ADALN, "a5": _ADALN_V2["a5"]},
    "rain_fusion_attention": _SPARSE,
    "rain_fusion_attention_v3": _SPARSE_BY_MASK,
}

TORCH: dict[str, Rule] = {
    "convolution": _nn("conv/convolution_forward/docs/aclnnConvolution", **_LINEAR),
    # `torch.npu.conv.allow_hf32 = False` is cubeMathType 0 (KEEP_DTYPE), with which A2 and A3 do not take float32.
    "convolution_without_hf32": _nn("conv/convolution_forward/docs/aclnnConvolution", a2=HALVES, a3=HALVES, a5=FLOATS),
    "matmul": _nn("matmul/mat_mul_v3/docs/aclnnMatmul", **_LINEAR),
    "addmm": _nn("matmul/mat_mul_v3/docs/aclnnAddmm&aclnnInplaceAddmm", **_LINEAR),
    "mm": _nn("matmul/mat_mul_v3/docs/aclnnMm", **_LINEAR),
    "bmm": _nn("matmul/batch_mat_mul_v3/docs/aclnnBatchMatMul", **_LINEAR),
    "native_layer_norm": _LAYER_NORM,
    # As an inference's, with parameters in float32 also for 16-bit frames (norm/batch_norm_v3/README.md).
    "native_batch_norm": _nn("norm/batch_norm_v3/docs/aclnnBatchNorm", a2=FLOATS, a3=FLOATS, a5=FLOATS),
    "var_mean": _says("hicann/ops-math, math/reduce_var/docs/aclnnVarMean.md", a2=FLOATS, a3=FLOATS, a5=FLOATS),
}

OPERATORS = {**TORCH_NPU, **MINDIE_SD, **TORCH}


# Exchanges between cards

_WHOLE = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)
_SENT = (*_WHOLE, *FLOATS, torch.float64)
_SENT_950 = (*_SENT, torch.float8_e5m2, torch.float8_e4m3fn)
_SUMMED = (torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
_SUMMED_950 = (*_SUMMED, torch.uint64, torch.float64)


def _hccl(name: str, a2: Dtypes = _SENT, a3: Dtypes = _SENT, a5: Dtypes = _SENT_950) -> dict[str, Support]:
    return _says(f"hicann/hccl, docs/zh/api_ref/comm_op_interface/{name}.md", a2=a2, a3=a3, a5=a5)


HCCL: dict[str, Rule] = {
    "HcclAlltoAll": _hccl("HcclAlltoAll"),
    "HcclAllGather": _hccl("HcclAllGather"),
    "HcclAllReduce": _hccl("HcclAllReduce", _SUMMED, _SUMMED, _SUMMED_950),  # sum, prod, max and min
    "HcclBatchSendRecv": _hccl("HcclBatchSendRecv"),
    "HcclSend": _hccl("HcclSend"),
    "HcclRecv": _hccl("HcclRecv"),
}
# torch.distributed's functions, and FSDP2's -> what torch_npu's ProcessGroupHCCL.cpp calls for them.
COLLECTIVES = {
    "all_to_all_single": "HcclAlltoAll",  # with equal parts, as Ulysses sends
    "all_gather_into_tensor": "HcclAllGather",
    "all_gather_single": "HcclAllGather",  # its name since torch 2.13
    "all_reduce": "HcclAllReduce",
    "batch_isend_irecv": "HcclBatchSendRecv",  # of P2POps, which name these:
    "isend": "HcclSend",
    "irecv": "HcclRecv",
    "fully_shard": "HcclAllGather",  # a forward gathers, and reduces nothing
}


# Limits of shapes


@dataclass(frozen=True)
class AttentionLimits:
    """The largest shapes of an attention operator in a 16-bit dtype. head_dim is a multiple of `multiple`."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    multiple: int
    source: str


ATTENTION_LIMITS = {
    "npu_fusion_attention": AttentionLimits(
        2 * 2**20, 2**20, 256, 768, 1, OPERATORS["npu_fusion_attention"]["a2"].source
    ),
    # head_dim is a multiple of 16 bytes.
    "npu_fused_infer_attention_score": AttentionLimits(
        65536, 20 * 2**20, 256, 512, 8, OPERATORS["npu_fused_infer_attention_score"]["a2"].source
    ),
}
# On the 950 series; the first in MXFP8. By the pages of their aclnn operators.
HEAD_DIMS = {"npu_fused_infer_attention_score_v2": (64, 128), "block_sparse_attention": (64, 128)}
# The weights for which npu_quant_matmul's page recommends FRACTAL_NZ of [K, N], not transposed.
NZ_WEIGHTS = _torch_npu("torch_npu-npu_quant_matmul", a2=(torch.int8,), a3=(torch.int8,), a5=NOT)
# msModelSlim's formats whose weights npu_quant_matmul takes in another dtype than int8.
FORMAT_DTYPES = {"W8A8_MXFP8": torch.float8_e4m3fn, "W4A4_DYNAMIC": torch.int32}
ROTARY_LANES = 999  # the most batch x heads of npu_rotary_mul with interleaved pairs, as its page says
REDUCING_RANKS = (2, 4, 8)  # group sizes of npu_mm_all_reduce_base, besides 1


# Questions to the rules


def supports(card: str | None, operator: str, dtype: torch.dtype) -> bool:
    """Whether `operator` takes tensors of this dtype on `card`. An unknown card (None), such as one that is newer than
    these rules, counts as able to do what any known card can: CANN refuses what it cannot."""
    rule = OPERATORS[operator]
    return any(dtype in rule[known].dtypes for known in ([card] if card else SERIES))


def require_operator(card: str | None, operator: str, dtype: torch.dtype, advice: str) -> None:
    """Raises ValueError with `advice` if `card` does not support `operator` in this dtype."""
    if supports(card, operator, dtype):
        return
    rule = OPERATORS[operator]
    where = f"on cards of {SERIES[card]}" if card else "on any card"
    taken = rule[card].dtypes if card else ()
    if taken:
        raise coded_error("AV-1412", f"{operator} takes {_names(taken)} {where}, not {_name(dtype)}. {advice}")
    others = [SERIES[other] for other in SERIES if dtype in rule[other].dtypes]
    only = f" It is for cards of {' and '.join(others)}." if others else ""
    raise coded_error("AV-1412", f"{operator} does not work in {_name(dtype)} {where}.{only} {advice}")


def require_format(card: str | None, name: str) -> None:
    """Raises ValueError if `card` does not support the products of linear layers in msModelSlim's format `name`."""
    kept = FORMAT_DTYPES.get(name, torch.int8)
    if supports(card, "npu_quant_matmul", kept):
        return
    able = " and ".join(SERIES[other] for other in SERIES if supports(other, "npu_quant_matmul", kept))
    raise coded_error(
        "AV-1407",
        f"The model is quantized as {name}, which only cards of {able} compute; this card is of {SERIES[card]}. Load "
        "the model's W8A8_DYNAMIC, bf16 or fp16 form.",
    )


def check_attention(operator: str, query: Tensor, key: Tensor) -> None:
    """Raises ValueError for query [B, S, heads, head_dim] and key [B, L, ...] that exceed the operator's limits."""
    limits = ATTENTION_LIMITS[operator]
    batch, tokens, heads, head_dim = query.shape
    given = {"videos": batch, "tokens": max(tokens, key.shape[1]), "heads": heads, "values per head": head_dim}
    most = dict(zip(given, (limits.batch, limits.tokens, limits.heads, limits.head_dim)))
    wrong = [f"{given[name]} {name} (at most {most[name]})" for name in given if given[name] > most[name]]
    if head_dim % limits.multiple:
        wrong.append(f"{head_dim} values per head (a multiple of {limits.multiple})")
    if wrong:
        raise coded_error(
            "AV-1417",
            f"{operator} does not take {', '.join(wrong)}. Set attention to 'plain', or make a smaller or shorter "
            "video.",
        )


def check_head_dim(operator: str, head_dim: int, advice: str) -> None:
    """Raises ValueError with `advice` for heads of a size that the operator does not take."""
    if head_dim not in HEAD_DIMS[operator]:
        sizes = " or ".join(map(str, HEAD_DIMS[operator]))
        raise coded_error(
            "AV-1417", f"{operator} takes heads of {sizes} values, but this model's have {head_dim}. {advice}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Dtypes) -> str:
    return " and ".join(map(_name, dtypes))
