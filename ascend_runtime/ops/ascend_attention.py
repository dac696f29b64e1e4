"""An NPU's attention operators, one function each, with query [B, S, heads, head_dim] and key, value [B, L, ...].

Their limits (dtypes, layouts, cards) are those that the documents of torch_npu 2.13 and MindIE SD 3.1 state.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .card_rules import check_attention, check_head_dim
from .libraries import mindiesd, torch_npu
from .precision import LOG_SUM_EXP
from .sparse import BLOCK

SHORTEST_LASER = 2048  # tokens; MindIE SD computes shorter sequences by npu_fusion_attention
# The codes of MXFP8 for npu_fused_infer_attention_score_v2, as in MindIE SD's MXFP8RotateQuantFA.
MXFP8_BY_HEAD_DIM, MXFP8_BY_TOKEN = 6, 8


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By npu_fusion_attention."""
    return _fusion_attention(query, key, value)[0]


def fused_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """By npu_fusion_attention: (attention, LSE [B, S, heads])."""
    out, largest, total = _fusion_attention(query, key, value)[:3]
    lse = largest[..., 0] + total[..., 0].log()  # both are [B, heads, S, 8], with eight equal values
    return out, lse.transpose(1, 2).to(LOG_SUM_EXP.dtype)


def _fusion_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple:
    check_attention("npu_fusion_attention", query, key)
    return torch_npu().npu_fusion_attention(query, key, value, query.shape[2], "BSND", scale=_scale(query))


def infer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By npu_fused_infer_attention_score."""
    return _infer(query, key, value, with_lse=False)[0]


def infer_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """By npu_fused_infer_attention_score: (attention, LSE [B, S, heads])."""
    out, lse = _infer(query, key, value, with_lse=True)  # [B, heads, S, 1]
    return out, lse.squeeze(-1).transpose(1, 2).to(LOG_SUM_EXP.dtype)


def _infer(query: Tensor, key: Tensor, value: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    check_attention("npu_fused_infer_attention_score", query, key)
    heads = query.shape[2]
    return torch_npu().npu_fused_infer_attention_score(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        num_heads=heads,
        num_key_value_heads=heads,
        scale=_scale(query),
        input_layout="BSND",
        softmax_lse_flag=with_lse,
    )


def laser(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By MindIE SD's laser attention; of short sequences, such as a text's, by `infer`."""
    if min(query.shape[1], key.shape[1]) < SHORTEST_LASER:
        return infer(query, key, value)
    return mindiesd().attention_forward(
        query, key, value, scale=_scale(query), opt_mode="manual", op_type="ascend_laser_attention", layout="BNSD"
    )


def fastest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By the fastest of MindIE SD's operators for these shapes, which it times at their first use."""
    return mindiesd().attention_forward(query, key, value, scale=_scale(query), opt_mode="runtime")


def fp8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With MXFP8 products (fp8 with a power-of-two scale for each group of 32): self-attention on 950 series cards.

    Query and key are rotated by a Hadamard matrix first, which does not change their products, and spreads outliers
    over the head dim (Ashkboos et al., QuaRot, arXiv 2404.00456).
    """
    batch, length, heads, head_dim = query.shape
    check_head_dim("npu_fused_infer_attention_score_v2", head_dim, "Set attention to 'auto'.")
    rotation = _hadamard(head_dim, query.device, query.dtype)
    query, key, value = (x.flatten(0, 1) for x in (query @ rotation, key @ rotation, value))  # [T, heads, head_dim]
    fp8_dtype, scale_dtype = torch.float8_e4m3fn, torch_npu().float8_e8m0fnu
    (q, q_scale), (k, k_scale), (v, v_scale) = (
        torch_npu().npu_dynamic_mx_quant(x, axis=axis, dst_type=fp8_dtype)
        for x, axis in ((query, -1), (key, -1), (value, 0))
    )
    ends = [length * (i + 1) for i in range(batch)]
    out, _ = torch_npu().npu_fused_infer_attention_score_v2(
        q,
        k,
        v,
        input_layout="TND",
        num_query_heads=heads,
        num_key_value_heads=heads,
        softmax_scale=head_dim**-0.5,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        dequant_scale_query=q_scale,
        dequant_scale_key=k_scale,
        dequant_scale_value=v_scale,
        query_quant_mode=MXFP8_BY_HEAD_DIM,
        key_quant_mode=MXFP8_BY_HEAD_DIM,
        value_quant_mode=MXFP8_BY_TOKEN,
        query_dtype=fp8_dtype,
        key_dtype=fp8_dtype,
        value_dtype=fp8_dtype,
        dequant_scale_query_dtype=scale_dtype,
        dequant_scale_key_dtype=scale_dtype,
        dequant_scale_value_dtype=scale_dtype,
        out_dtype=query.dtype,
    )
    return out.unflatten(0, (batch, length))


def chosen_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What `block_sparse` needs of a mask [B, heads, blocks, blocks]: the key blocks of each query block [B, query
    blocks, heads, key blocks], in order, padded with -1; and their numbers [B, query blocks, heads].

    A mask may be kept for several steps, one in each block of the network: its key blocks are kept in int16, which is
    enough for 4 million tokens.
    """
    count = mask.shape[-1]
    ranked = torch.where(mask, torch.arange(count, device=mask.device), count).float().sort(-1).values
    indices = torch.where(ranked < count, ranked, -1).to(torch.int16)
    return indices.transpose(1, 2), mask.sum(-1).transpose(1, 2)


def block_sparse(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """By the operator of MindIE SD's rf_v2, for A2 and A3 cards: see `PlainOperators.sparse_attention`. indices,
    counts: from `chosen_blocks`.

    One video at a time, because the operator takes one video's mask.
    """
    rain_fusion = mindiesd().layers.flash_attn.sparse_flash_attn_rf_v2
    outs = [
        rain_fusion.rain_fusion_attention(
            *(x.contiguous() for x in qkv),
            scale=_scale(query),
            head_num=query.shape[1],
            input_layout="BNSD",
            select_idx=chosen.long(),
            select_num_idx=count,
            blockshape=[BLOCK, BLOCK],
            actual_seq_lengths=[query.shape[2]],
            actual_seq_lengths_kv=[query.shape[2]],
            inner_precise=0,
        )
        for *qkv, chosen, count in zip(*(x.split(1) for x in (query, key, value)), indices, counts)
    ]
    return torch.cat(outs)


def block_sparse_by_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """By the operator of MindIE SD's rf_v3, for cards of the 950 series. mask: in int8."""
    check_head_dim("block_sparse_attention", query.shape[-1], "Turn RainFusion off.")
    lengths = [query.shape[2]] * query.shape[0]
    return mindiesd().layers.flash_attn.sparse_flash_attn_rf_v3.rain_fusion_attention_v3(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        mask,
        scale=_scale(query),
        head_num=query.shape[1],
        input_layout="BNSD",
        actual_seq_lengths=lengths,
        actual_seq_lengths_kv=lengths,
        block_size_q=BLOCK,
        inner_precise=4,  # required by these cards
    )


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


@lru_cache(maxsize=4)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's orthogonal Hadamard matrix [size, size]; size is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(device, dtype)
