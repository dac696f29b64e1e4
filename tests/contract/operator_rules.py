"""What NPU operators demand of their arguments beyond their schemas, as their documentation in torch_npu 2.13 and
MindIE SD 3.1 states it. Meta kernels let much of it pass: a nonsense layout, a gamma of another dtype."""

import torch
import versions
from ascend_runtime.ops import card_rules

HALVES = (torch.float16, torch.bfloat16)
LAYOUTS = {
    "npu_fusion_attention": ("BSH", "SBH", "BSND", "BNSD", "TND"),
    "npu_fused_infer_attention_score": ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND"),
    "npu_fused_infer_attention_score_v2": ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND"),
}
MXFP8_GROUP = 32
FORBIDDEN = "This call breaks the rules of the card that is played."
QUINT4X2 = (torch.quint4x2, 16)  # as c10 numbers it
E8M0 = 293  # torch_npu.float8_e8m0fnu
DTYPES = {5: torch.float16, 15: torch.bfloat16, **{dtype: dtype for dtype in HALVES}}  # c10's numbers, or themselves


def by_schema(schema, arguments, keywords):
    """The values of all parameters of an operator by name; fails where a call does not fit the schema."""
    parameters = schema.arguments
    positional = [p for p in parameters if not p.kwarg_only]
    assert len(arguments) <= len(positional), schema
    given = {p.name: value for p, value in zip(positional, arguments)}
    unknown = keywords.keys() - {p.name for p in parameters}
    assert not unknown, f"{unknown} are unknown to {schema}"
    assert not given.keys() & keywords.keys(), f"given twice: {given.keys() & keywords.keys()} in {schema}"
    given |= keywords
    missing = [p.name for p in parameters if p.name not in given and not p.has_default_value()]
    assert not missing, f"{missing} are missing of {schema}"
    return versions.LATER | {p.name: given.get(p.name, p.default_value) for p in parameters}


def check(name, values, card=None):
    """Asserts that `values`, the arguments of operator `name` by their names in its schema, are what it takes, and that
    the card has it; None: an unknown card."""
    assert name in card_rules.OPERATORS, f"{name} has no row in card_rules.py"
    dtype = next(value.dtype for value in values.values() if isinstance(value, torch.Tensor))
    card_rules.require_operator(card, name, dtype, FORBIDDEN)
    RULES[name](values)


def _attention(name, values, layout, heads, scale, dtypes):
    query, key, value = values["query"], values["key"], values["value"]
    assert layout in LAYOUTS[name], f"{name} knows no layout {layout!r}"
    assert query.dtype == key.dtype == value.dtype and query.dtype in dtypes, query.dtype
    heads_at, tokens_at = {"BSND": (2, 1), "BNSD": (1, 2), "TND": (1, 0)}[layout]
    assert heads == query.shape[heads_at] == key.shape[heads_at] == value.shape[heads_at]
    assert key.shape == value.shape and query.shape[-1] == key.shape[-1]
    if layout != "TND":
        assert query.shape[0] == key.shape[0]
    assert abs(scale - query.shape[-1] ** -0.5) < 1e-9
    return tokens_at


def _fusion_attention(values):
    _attention("npu_fusion_attention", values, values["input_layout"], values["head_num"], values["scale"],
               (*HALVES, torch.float32))  # fmt: skip
    assert values["keep_prob"] == 1 and values["sparse_mode"] == 0
    assert values["pre_tockens"] >= values["key"].shape[1] and values["next_tockens"] >= values["key"].shape[1]


def _fusion_attention_v3(values):
    """As torch_npu calls it for scaled_dot_product_attention; its own check is what it hands over."""
    assert values["input_layout"] == "BNSD" and values["keep_prob"] == 1 and values["query"].ndim == 4
    assert values["query"].dtype == values["key"].dtype == values["value"].dtype


def _fused_infer(values):
    name = "npu_fused_infer_attention_score"
    _attention(name, values, values["input_layout"], values["num_heads"], values["scale"], HALVES)
    assert values["num_key_value_heads"] in (0, values["num_heads"]) and values["num_heads"] <= 256
    assert all(values[part].is_contiguous() for part in ("query", "key", "value"))
    assert values["query"].shape[1] > 1, "one token takes another branch, which has other limits"


def _fused_infer_v2(values):
    _attention("npu_fused_infer_attention_score_v2", values, values["input_layout"], values["num_query_heads"],
               values["softmax_scale"], (torch.float8_e4m3fn,))  # fmt: skip
    assert values["input_layout"] == "TND"
    for ends, tensor in (("actual_seq_qlen", "query"), ("actual_seq_kvlen", "key")):
        assert values[ends] == sorted(values[ends]) and values[ends][-1] == values[tensor].shape[0]
    tokens, heads, head_dim = values["query"].shape
    groups = -(-head_dim // MXFP8_GROUP)
    for part in ("query", "key"):
        assert values[f"dequant_scale_{part}"].shape == (tokens, heads, -(-groups // 2), 2)
    groups = -(-tokens // MXFP8_GROUP)
    assert values["dequant_scale_value"].shape == (-(-groups // 2), heads, head_dim, 2)
    modes = tuple(values[f"{part}_quant_mode"] for part in ("query", "key", "value"))
    assert modes == (6, 6, 8), "MXFP8: query and key by head_dim, value by token"


def _mx_quant(values):
    assert values["input"].dtype in (*HALVES, torch.float32) and 1 <= values["input"].ndim <= 7
    assert values["block_size"] == MXFP8_GROUP and values["round_mode"] == "rint"


def _dynamic_quant(values):
    x, smooth = values["input"], values["smooth_scales"]
    assert x.dtype in HALVES and x.ndim > 1
    assert values["quant_mode"] == "pertoken"
    assert smooth is None or smooth.dtype == x.dtype and smooth.shape == x.shape[-1:]
    assert values["dst_type"] is None or values["dst_type"] in QUINT4X2 and x.shape[-1] % 8 == 0


def _quantize(values):
    x, scales, zero_points = values["input"], values["scales"], values["zero_points"]
    assert x.dtype in (*HALVES, torch.float32) and values["axis"] == -1 and values["div_mode"]
    assert scales.shape == zero_points.shape == x.shape[-1:] and scales.dtype in (torch.float32, torch.bfloat16)
    assert zero_points.dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16)


def _quant_matmul(values):
    """Of two matrices of the same dtype, into 16 bits: int8, eight 4-bit integers in each int32 (A2 and A3), or fp8 in
    groups (950 series)."""
    x, weight, scale, rows, bias = (values[name] for name in ("x1", "x2", "scale", "pertoken_scale", "bias"))
    assert x.dtype == weight.dtype and x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[0]
    assert x.is_contiguous() and max(*x.shape[1:], *weight.shape) <= 65535
    if x.dtype == torch.float8_e4m3fn:
        _mx_matmul(values)
        return
    assert x.dtype in (torch.int8, torch.int32)
    assert values["group_sizes"] is values["scale_dtype"] is values["pertoken_scale_dtype"] is None
    if x.dtype == torch.int32:
        assert weight.t().is_contiguous(), "of a weight that is not transposed, the outputs would be packed"
        assert bias is None and rows is not None
    assert scale.shape == weight.shape[1:] and scale.dtype == torch.float32 and scale.is_contiguous()
    assert bias is None or bias.shape == weight.shape[1:]
    made = DTYPES[values["output_dtype"]]
    if rows is None:
        assert bias is None or bias.dtype in (torch.int32, *((torch.bfloat16, torch.float32) if made == torch.bfloat16
                                                              else ()))  # fmt: skip
    else:
        assert rows.shape == x.shape[:1] and rows.dtype == torch.float32
        assert bias is None or bias.dtype in (torch.int32, torch.float32, made)


def _mx_matmul(values):
    (count, width), outputs = values["x1"].shape, values["x2"].shape[1]
    scale, rows, bias = (values[name] for name in ("scale", "pertoken_scale", "bias"))
    pairs = -(-width // (2 * MXFP8_GROUP))
    assert values["group_sizes"] == [1, 1, MXFP8_GROUP] and scale.dtype == rows.dtype == torch.uint8
    assert values["scale_dtype"] == values["pertoken_scale_dtype"] == E8M0
    assert scale.shape == (pairs, outputs, 2) and rows.shape == (count, pairs, 2)
    assert values["x2"].t().is_contiguous() and scale.transpose(0, 1).is_contiguous(), "both are transposed, or none"
    assert bias is None or bias.dtype == torch.float32 and bias.shape == (outputs,)
    assert values["output_dtype"] in DTYPES


def _int4pack(values):
    weight = values["weight"]
    assert weight.dtype == torch.int32 and weight.is_contiguous() and weight.shape[-1] % 8 == 0
    assert weight.min() >= -8 and weight.max() <= 7 and values["inner_k_tiles"] == 0


def _format_cast(values):
    """Of an int8 weight [K, N], to FRACTAL_NZ; an N or K of 1 has no such format."""
    x = values["input"]
    assert values["acl_format"] == 29 and x.dtype == torch.int8 and x.ndim == 2 and min(x.shape) > 1
    assert x.is_contiguous() and values["customize_dtype"] is values["input_dtype"] is None


def _rms_norm(values):
    x, gamma = values["input"], values["gamma"]
    assert gamma.dtype == x.dtype and x.dtype in (*HALVES, torch.float32)
    assert gamma.shape == x.shape[-1:] and 2 <= x.ndim <= 8


def _rotary_mul(values):
    x, cos, sin = values["input"], values["r1"], values["r2"]
    assert values["rotary_mode"] == "interleave", "Wan rotates interleaved pairs"
    assert x.dtype == cos.dtype == sin.dtype, "aclnnRotaryPositionEmbedding: cos and sin have the data type of x"
    assert x.dtype in (*HALVES, torch.float32)
    batch, tokens, heads, head_dim = x.shape
    assert cos.shape == sin.shape == (1, tokens, 1, head_dim), "BSND takes 1S1D"
    assert head_dim % 2 == 0 and head_dim < 896 and batch * heads < 1000


def _gelu(values):
    assert values["approximate"] == "tanh", "Wan's"


def _mm_all_reduce(values):
    x, weight = values["x1"], values["x2"]
    assert x.ndim in (2, 3) and x.is_contiguous() and weight.ndim == 2 and weight.shape[0] == x.shape[-1]
    assert x.dtype == weight.dtype and x.dtype in HALVES
    assert isinstance(values["hcom"], str) and values["hcom"] and values["reduce_op"] == "sum"
    assert values["bias"] is None, "each rank would add it"


def _laser(values):
    query, key, value = values["query"], values["key"], values["value"]
    assert query.dtype == key.dtype == value.dtype == torch.float16, "MindIE SD brings them to float16"
    assert values["input_layout"] == "BNSD" and values["head_num"] == query.shape[1] == key.shape[1]
    for part in (query, key, value):
        assert part.is_contiguous() and part.shape[2] % 256 == 0 and part.shape[3] == 128, part.shape
    assert key.shape == value.shape and query.shape[0] == key.shape[0]
    assert values["pre_tokens"] == 2**31 - 1 or 0 < values["pre_tokens"] < 256, "a number of keys that are padding"


def _adaln(values):
    x = values["x"]
    assert x.ndim == 3 and x.dtype in (*HALVES, torch.float32)
    for part in ("scale", "shift"):
        assert values[part].dtype == x.dtype and values[part].shape in ((x.shape[0], x.shape[2]),
                                                                         (x.shape[0], 1, x.shape[2])), part  # fmt: skip
    for part in ("weight", "bias"):
        assert values[part] is None or values[part].shape == x.shape[-1:], part


def _mindiesd_layernorm(values):
    x = values["input"]
    assert tuple(values["normalized_shape"]) == x.shape[-1:] and x.dtype in (*HALVES, torch.float32)
    for part in ("weight", "bias"):
        assert values[part] is None or (values[part].dtype == x.dtype and values[part].shape == x.shape[-1:]), part
    assert values["impl_mode"] in (0, 1) or values["input"].dtype == torch.float16


def _fast_gelu(values):
    assert values["input"].dtype in (*HALVES, torch.float32) and values["input"].ndim <= 8


def _attention_forward(values):
    options = values["kwargs"]
    assert values["query"].ndim == 4 and not values["head_first"] and isinstance(values["scale"], float)
    assert options["opt_mode"] in ("runtime", "static", "manual")
    if options["opt_mode"] == "manual":
        assert options["op_type"] in ("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")
        assert options["layout"] == "BNSD", "the only one of laser attention"


def _layernorm_scale_shift(values):
    x, norm = values["x"], values["layernorm"]
    assert isinstance(norm, torch.nn.LayerNorm) and norm.normalized_shape == x.shape[-1:] and norm.weight is None
    for part in ("scale", "shift"):
        assert values[part].dtype == x.dtype and values[part].shape[0] == x.shape[0] and values["fused"]
        assert values[part].shape[1] in (1, x.shape[1]) and values[part].shape[2] == x.shape[2]


def _block_sparse(values, layout, heads, scale):
    """What aclnnRainFusionAttention and aclnnBlockSparseAttention share."""
    query = values["query"]
    assert layout == "BNSD" and heads == query.shape[1] and query.dtype in HALVES
    for part in ("key", "value"):
        assert values[part].shape == query.shape and values[part].dtype == query.dtype
    assert all(values[part].is_contiguous() for part in ("query", "key", "value"))
    assert abs(scale - query.shape[-1] ** -0.5) < 1e-9
    return query.shape, -(-query.shape[2] // 128)


def _select(values, batch, heads, blocks):
    index, count = values["select_idx"], values["select_num_idx"]
    assert batch == 1, "MindIE SD takes the first video's mask for all"
    assert index.dtype == count.dtype == torch.int64
    assert index.shape == (blocks, heads, blocks) and count.shape == (blocks, heads)
    assert values["blockshape"] == [128, 128] and values["inner_precise"] == 0, "bfloat16 takes fp32 softmax alone"


def _rain_fusion(values):
    (batch, heads, length, _), blocks = _block_sparse(values, values["input_layout"], values["head_num"],
                                                      values["scale"])  # fmt: skip
    _select(values, batch, heads, blocks)
    assert values["actual_seq_lengths"] == values["actual_seq_lengths_kv"] == [length]


def _rainfusionattention(values):
    (batch, heads, length, _), blocks = _block_sparse(values, values["q_input_layout"], values["head_num"],
                                                      values["scale"])  # fmt: skip
    _select(values, batch, heads, blocks)
    assert values["kv_input_layout"] == "BNSD" and values["attn_mask"] is None and values["mask_type"] == 0
    assert values["actual_seq_qlen"] == values["actual_seq_kvlen"] == [length]


def _by_mask(values, layout, heads, scale, block_shape):
    (batch, _, length, head_dim), blocks = _block_sparse(values, layout, heads, scale)
    mask = values["block_sparse_mask"]
    assert mask.dtype == torch.int8 and mask.shape == (batch, heads, blocks, blocks) and block_shape == [128, 128]
    assert values["actual_seq_lengths"] == values["actual_seq_lengths_kv"] == [length] * batch
    assert values["inner_precise"] == 4, "cards of the 950 series take no other"


def _rain_fusion_v3(values):
    sides = [values["block_size_q"], values["block_size_kv"] or values["block_size_q"]]
    _by_mask(values, values["input_layout"], values["head_num"], values["scale"], sides)


def _block_sparse_attention(values):
    _by_mask(values, values["q_input_layout"], values["num_key_value_heads"], values["scale_value"],
             values["block_shape"])  # fmt: skip
    assert values["kv_input_layout"] == "BNSD" and values["softmax_lse_flag"] == 0


RULES = {
    "rain_fusion_attention": _rain_fusion,
    "rainfusionattention": _rainfusionattention,
    "rain_fusion_attention_v3": _rain_fusion_v3,
    "block_sparse_attention": _block_sparse_attention,
    "npu_fusion_attention": _fusion_attention,
    "npu_fusion_attention_v3": _fusion_attention_v3,
    "npu_fused_infer_attention_score": _fused_infer,
    "npu_fused_infer_attention_score_v2": _fused_infer_v2,
    "npu_dynamic_mx_quant": _mx_quant,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quantize": _quantize,
    "npu_format_cast": _format_cast,
    "npu_convert_weight_to_int4pack": _int4pack,
    "npu_quant_matmul": _quant_matmul,
    "npu_rms_norm": _rms_norm,
    "npu_rotary_mul": _rotary_mul,
    "npu_gelu": _gelu,
    "npu_mm_all_reduce_base": _mm_all_reduce,
    "npu_fast_gelu": _fast_gelu,
    "la": _laser,
    "adaln": _adaln,
    "adaln_v2": _adaln,
    "layernorm": _mindiesd_layernorm,
    "attention_forward": _attention_forward,
    "layernorm_scale_shift": _layernorm_scale_shift,
}
