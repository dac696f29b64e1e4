"""Stand-ins that let NPU operators compute on the CPU: plain fp32 maths, under the real wheels' schemas.

`register` puts them behind torch_npu's and MindIE SD's own operator names, for CPU tensors. So our NPU code, the
wheels' Python and their schemas are the real ones; the arithmetic is not. What an operator demands of its arguments is
held (operator_rules.py), and an option that a stand-in does not compute is refused. test_cpu_kernels.py holds each to
torch's own maths. Sources: the operators' documentation in torch_npu 2.13 (op_plugin) and the kernels' source that
MindIE SD 3.1 carries (laser_attention).
"""

import inspect
import os

import operator_rules
import torch
import torch.nn.functional as F
import versions
from torch.distributed.distributed_c10d import _resolve_process_group

NO_LIMIT = 2**31 - 1
MXFP8_GROUP, MXFP8_LARGEST_EXPONENT, E8M0_BIAS = 32, 8, 127
FP16_LOWEST = -60000.0  # what laser attention writes over the scores of padding
KERNELS = {}  # name with namespace -> function, whose parameters are those of the schema that it computes
_LIBRARIES = []  # registrations end with these objects


def register(note=None, card=lambda: None):
    """Has the operators of `KERNELS` compute on CPU tensors in this process; mindiesd's only where it is loaded.

    note: called with an operator's name each time that it is asked to compute. card: returns the one that the process
    plays, whose rules hold; None: an unknown one.
    """
    _LIBRARIES.clear()  # torch 2.7 takes one kernel of an operator
    for namespace in ("npu", "mindiesd"):
        library = torch.library.Library(namespace, "IMPL")
        _LIBRARIES.append(library)
        for name, kernel in KERNELS.items():
            if name.startswith(f"{namespace}::") and torch._C._dispatch_has_kernel(name):
                library.impl(name.partition("::")[2], _strict(name, kernel, note, card), "CPU")


def note_in(path):
    """A `note` that adds a line to a file: the rank and the operator. It outlives a killed process."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    rank = os.environ.get("RANK", "none")
    return lambda name: os.write(file, f"{rank} {name}\n".encode())


def _strict(full_name, kernel, note, card):
    """`kernel`, called as the dispatcher calls: by position, without what has its default."""
    namespace, name = full_name.split("::")
    parameters = getattr(getattr(torch.ops, namespace), name).default._schema.arguments
    computed = inspect.signature(kernel).parameters.keys()
    known = {p.name for p in parameters} | versions.LATER.keys()
    assert computed <= known, f"{full_name} has no {computed - known}"

    def run(*positional, **keywords):
        given = {p.name: value for p, value in zip(parameters, positional)} | keywords
        values = versions.LATER | {p.name: given.get(p.name, p.default_value) for p in parameters}
        for parameter in parameters:
            left_out = parameter.name not in computed and values[parameter.name] != parameter.default_value
            assert not left_out, f"the stand-in for {full_name} does not compute {parameter.name}"
        operator_rules.check(name, values, card())
        if note:
            note(full_name)
        return kernel(**{parameter: values[parameter] for parameter in computed})

    return run


def kernel(name):
    def put(function):
        KERNELS[name] = function
        return function

    return put


# Attention


def _by_heads(x, layout, heads):
    """[B, heads, S, D] of a tensor in `layout`, in fp32."""
    if layout in ("BSH", "BSND"):
        x = x.unflatten(-1, (heads, -1)) if layout == "BSH" else x
        return x.transpose(1, 2).float()
    assert layout == "BNSD", layout
    return x.float()


def _in_layout(x, layout):
    """The inverse of `_by_heads`, but for the dtype."""
    if layout == "BNSD":
        return x.contiguous()
    return (x.transpose(1, 2).flatten(2) if layout == "BSH" else x.transpose(1, 2)).contiguous()


def _attend(query, key, value, scale):
    """(softmax(scale q k^T) v, the rows' largest scores, their sums of exponentials above it); by heads, fp32."""
    scores = query @ key.transpose(-1, -2) * scale
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total @ value, largest, total


@kernel("npu::npu_fusion_attention")
def fusion_attention(query, key, value, head_num, input_layout, scale, pre_tockens, next_tockens):
    """Also the softmax's parts [B, heads, S, 8], each value eight times. Without a mask the windows hide nothing."""
    out, *parts = _attend(*(_by_heads(x, input_layout, head_num) for x in (query, key, value)), scale)
    parts = (part.expand(-1, -1, -1, 8).contiguous() for part in parts)
    return _in_layout(out, input_layout).to(query.dtype), *parts, query.new_empty(0), 0, 0, 0


@kernel("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(
    query, key, value, num_heads, scale, pre_tokens, next_tokens, input_layout, num_key_value_heads, softmax_lse_flag
):
    """Also the LSE [B, heads, S, 1]."""
    out, largest, total = _attend(*(_by_heads(x, input_layout, num_heads) for x in (query, key, value)), scale)
    lse = largest + total.log() if softmax_lse_flag else torch.empty(0)
    return _in_layout(out, input_layout).to(query.dtype), lse


@kernel("mindiesd::la")
def laser_attention(query, key, value, scale_value, head_num, input_layout, pre_tokens, next_tokens, is_highPrecision):
    """Scores and weights are fp16, sums fp32; pre_tokens, where it is no window, is how many of the keys are padding.

    Returns what the kernel writes, in fp32: the LSE [B, heads, S] and the attention.
    """
    scores = (query.float() @ key.float().transpose(-1, -2)).half() * torch.tensor(scale_value).half()
    if pre_tokens != NO_LIMIT:
        scores[..., -pre_tokens:] = FP16_LOWEST
    scores = scores.float()
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return (largest + total.log()).squeeze(-1), weights.half().float() @ value.float() / total


@kernel("mindiesd::rainfusionattention")
def rain_fusion_attention(
    query, key, value, select_idx, select_num_idx, blockshape, actual_seq_qlen, actual_seq_kvlen, q_input_layout,
    kv_input_layout, head_num, scale, inner_precise
):  # fmt: skip
    """BNSD of one video alone. The real one's second output, the LSE, is not made."""
    rows, heads, columns = select_idx.shape
    mask = torch.zeros(heads, rows, columns, dtype=torch.bool)
    for row in range(rows):
        for head in range(heads):
            chosen = select_idx[row, head, : select_num_idx[row, head]]
            assert chosen.tolist() == sorted(set(chosen.tolist())) and (chosen >= 0).all(), "in order, each once"
            assert (select_idx[row, head, len(chosen) :] == -1).all(), "and -1 behind them"
            mask[head, row, chosen] = True
    return _attend_blocks(query, key, value, mask[None], blockshape, scale), query.new_empty(0)


@kernel("mindiesd::block_sparse_attention")
def block_sparse_attention(
    query, key, value, block_sparse_mask, block_shape, q_input_layout, kv_input_layout, num_key_value_heads,
    scale_value, inner_precise, actual_seq_lengths, actual_seq_lengths_kv, softmax_lse_flag
):  # fmt: skip
    """BNSD alone. The LSE, which is not asked for, is empty."""
    return _attend_blocks(query, key, value, block_sparse_mask != 0, block_shape, scale_value), torch.empty(0)


def _attend_blocks(query, key, value, mask, sides, scale):
    """By heads, under a mask of blocks [B, heads, rows, columns]."""
    length = query.shape[2]
    within = mask.repeat_interleave(sides[0], 2).repeat_interleave(sides[1], 3)[:, :, :length, :length]
    scores = (query.float() @ key.float().transpose(-1, -2) * scale).masked_fill(~within, -torch.inf)
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


# MXFP8: fp8 with a power of two for each group of 32 (OCP Microscaling Formats 1.0)


@kernel("npu::npu_dynamic_mx_quant")
def dynamic_mx_quant(input, axis, dst_type):
    """fp8 of input's shape, and the scales' exponents in uint8, in pairs: [..., groups / 2 at `axis`, ..., 2]."""
    axis %= input.ndim
    x = input.float().movedim(axis, -1)
    length, groups = x.shape[-1], -(-x.shape[-1] // MXFP8_GROUP)
    x = F.pad(x, (0, 2 * -(-groups // 2) * MXFP8_GROUP - length)).unflatten(-1, (-1, MXFP8_GROUP))
    largest = x.abs().amax(-1, keepdim=True).clamp_min(2.0**-126)
    exponent = largest.log2().floor() - MXFP8_LARGEST_EXPONENT
    limit = torch.finfo(torch.float8_e4m3fn).max
    quantized = (x / exponent.exp2()).clamp(-limit, limit).flatten(-2)[..., :length].to(torch.float8_e4m3fn)
    scales = (exponent.squeeze(-1) + E8M0_BIAS).clamp(0, 254).to(torch.uint8).unflatten(-1, (-1, 2))
    return quantized.movedim(-1, axis), scales.movedim(-2, axis)


def dequantized(x, scales, axis):
    """What `dynamic_mx_quant` quantized, in fp32."""
    axis %= x.ndim
    exponents = scales.movedim(axis, -2).flatten(-2).float() - E8M0_BIAS
    factors = exponents.exp2().repeat_interleave(MXFP8_GROUP, -1)
    moved = x.float().movedim(axis, -1)
    return (moved * factors[..., : moved.shape[-1]]).movedim(-1, axis)


@kernel("npu::npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(
    query, key, value, actual_seq_qlen, actual_seq_kvlen, dequant_scale_query, dequant_scale_key, dequant_scale_value,
    num_query_heads, num_key_value_heads, softmax_scale, input_layout, query_quant_mode, key_quant_mode,
    value_quant_mode, query_dtype, key_dtype, value_dtype, dequant_scale_query_dtype, dequant_scale_key_dtype,
    dequant_scale_value_dtype, out_dtype,
):  # fmt: skip
    """MXFP8 of packed sequences alone: query, key [T, heads, D] in groups along D, value along T."""
    query, key = dequantized(query, dequant_scale_query, -1), dequantized(key, dequant_scale_key, -1)
    value = dequantized(value, dequant_scale_value, 0)
    outs, q_start, kv_start = [], 0, 0
    for q_end, kv_end in zip(actual_seq_qlen, actual_seq_kvlen):
        qkv = (x.transpose(0, 1) for x in (query[q_start:q_end], key[kv_start:kv_end], value[kv_start:kv_end]))
        outs.append(_attend(*qkv, softmax_scale)[0].transpose(0, 1))
        q_start, kv_start = q_end, kv_end
    return torch.cat(outs).to(_DTYPES[out_dtype]), torch.empty(0)


_DTYPES = operator_rules.DTYPES


# W8A8 and W4A4

INT8, INT4, QINT8 = 127, 7, 12  # c10's number of torch.qint8


@kernel("npu::npu_dynamic_quant")
def dynamic_quant(input, smooth_scales, dst_type):
    """int8 of input's shape, or int32 with eight 4-bit integers each, and the scale of each row. The product with
    smooth_scales is not rounded."""
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = x.abs().amax(-1) / (INT8 if dst_type is None else INT4)
    rows = (x / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
    return rows.to(torch.int8) if dst_type is None else in_int32(rows), scale


def in_int32(x):
    """int32 [..., K/8] of integers from -8 to 7 [..., K], the first in the lowest bits."""
    places = 16 ** torch.arange(8)
    whole = (x.long().unflatten(-1, (-1, 8)) % 16 * places).sum(-1)
    return torch.where(whole < 2**31, whole, whole - 2**32).to(torch.int32)


def of_int32(packed):
    """The inverse of `in_int32`, in fp64."""
    digits = packed.long().unsqueeze(-1) // 16 ** torch.arange(8) % 16
    return torch.where(digits < 8, digits, digits - 16).flatten(-2).double()


@kernel("npu::npu_convert_weight_to_int4pack")
def convert_weight_to_int4pack(weight):
    return in_int32(weight)


@kernel("npu::npu_format_cast")
def format_cast(input, acl_format):
    """A copy: memory on a CPU has no other format."""
    return input.clone()


@kernel("npu::npu_quantize")
def quantize(input, scales, zero_points, dtype, axis):
    assert dtype in (QINT8, torch.qint8), "int8"
    rows = input.float() / scales.float() + zero_points.float()
    return rows.round().clamp(-INT8 - 1, INT8).to(torch.int8)


@kernel("npu::npu_quant_matmul")
def quant_matmul(
    x1, x2, scale, pertoken_scale, bias, output_dtype, pertoken_scale_dtype, scale_dtype, group_sizes
):  # fmt: skip
    """(x1 x2 + bias, if that is of whole numbers) scale pertoken_scale + bias, in fp32, and in 16 bits then."""
    if x1.dtype == torch.float8_e4m3fn:
        out = dequantized(x1, pertoken_scale, -1).double() @ dequantized(x2, scale, 0).double()
        return (out if bias is None else out + bias).to(_DTYPES[output_dtype])
    if x1.dtype == torch.int32:
        x1, x2 = of_int32(x1), of_int32(x2.t()).t()
    out = x1.double() @ x2.double()
    whole = bias is not None and not bias.is_floating_point()
    out = ((out + bias if whole else out) * scale.double()).float()
    out = out if pertoken_scale is None else out * pertoken_scale.unsqueeze(-1)
    return (out if bias is None or whole else out + bias.float()).to(_DTYPES[output_dtype])


# Norms


@kernel("npu::npu_rms_norm")
def rms_norm(input, gamma, epsilon):
    """Also the reciprocal rms [..., 1] in fp32."""
    x = input.float()
    reciprocal = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x * reciprocal * gamma.float()).to(input.dtype), reciprocal


def _layer_norm(x, weight, bias, eps):
    """(normalised in fp32, mean [..., 1], reciprocal of the standard deviation [..., 1])"""
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    reciprocal = (x.var(-1, keepdim=True, correction=0) + eps).rsqrt()
    normed = (x - mean) * reciprocal
    normed = normed if weight is None else normed * weight.float()
    return normed if bias is None else normed + bias.float(), mean, reciprocal


@kernel("mindiesd::layernorm")
def layernorm(input, normalized_shape, weight, bias, eps, impl_mode):
    return tuple(part.to(input.dtype) for part in _layer_norm(input, weight, bias, eps))


@kernel("mindiesd::adaln_v2")
def adaln_v2(x, scale, shift, weight, bias, epsilon):
    """layer_norm(x) (1 + scale) + shift; x [B, S, D], scale and shift [B, D] or [B, 1, D]."""
    normed, mean, reciprocal = _layer_norm(x, weight, bias, epsilon)
    scale, shift = (part.float().reshape(x.shape[0], 1, x.shape[2]) for part in (scale, shift))
    return tuple(part.to(x.dtype) for part in (normed * (1 + scale) + shift, mean, reciprocal))


@kernel("mindiesd::adaln")
def adaln(x, scale, shift, weight, bias, epsilon):
    return adaln_v2(x, scale, shift, weight, bias, epsilon)[0]


# The rest of a block


@kernel("npu::npu_rotary_mul")
def rotary_mul(input, r1, r2, rotary_mode):
    """input r1 + turned(input) r2; r1, r2 [1, S, 1, D], cosine and sine. Rounds once, as a public kernel of the same
    kind does, which casts 16 bits to fp32 and back (hicann/cann-recipes-infer, ops/ascendc/src/
    inplace_partial_rotary_mul/op_kernel/rotate_interleaved_split_s.h)."""
    x = input.float()
    if rotary_mode == "interleave":  # pairs (x[2i], x[2i + 1])
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


@kernel("npu::npu_gelu")
def gelu(input, approximate):
    return F.gelu(input.float(), approximate=approximate).to(input.dtype)


@kernel("npu::npu_fast_gelu")
def fast_gelu(input):
    """x sigmoid(1.702 x), as on A2 and A3."""
    return (input.float() * torch.sigmoid(1.702 * input.float())).to(input.dtype)


@kernel("npu::npu_mm_all_reduce_base")
def mm_all_reduce_base(x1, x2, hcom, reduce_op, bias):
    """The sum over the ranks of (x1 x2 + bias): the bias as many times as there are ranks. hcom: a process group's
    name, here torch's own."""
    out = x1.float() @ x2.float()
    out = out if bias is None else out + bias.float()
    torch.distributed.all_reduce(out, group=_resolve_process_group(hcom))
    return out.to(x1.dtype)
