"""The stand-ins of NPU operators (cpu_kernels.py) against torch's own maths, called as the package calls operators.

Also: their outputs have the shapes and dtypes of the real wheels' meta kernels, and bad arguments are refused.
"""

import os
import subprocess
import sys
from pathlib import Path

import cpu_kernels
import mindiesd
import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch.testing import assert_close

SEED = 20
B, S, L, HEADS, DIM = 2, 48, 40, 4, 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]


@pytest.fixture(scope="module", autouse=True)
def calls():
    """How often each operator was asked to compute."""
    counted = {}
    cpu_kernels.register(lambda name: counted.update({name: counted.get(name, 0) + 1}))
    return counted


@pytest.fixture
def random():
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def near(dtype):
    """One rounding of the output."""
    return {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}


def as_meta(operator, *arguments, **options):
    """Asserts that the real meta kernel gives outputs of the same shapes and dtypes; returns what is computed."""
    outs = operator(*arguments, **options)
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    metas = operator(*map(to_meta, arguments), **{name: to_meta(x) for name, x in options.items()})
    for out, meta in zip(*(x if isinstance(x, tuple) else (x,) for x in (outs, metas)), strict=True):
        assert type(out) is type(meta)
        if isinstance(out, torch.Tensor):
            assert out.shape == meta.shape and out.dtype == meta.dtype, (out.shape, meta.shape, out.dtype, meta.dtype)
    return outs


def qkv(random, layout, dtype, lengths=(S, L)):
    """(query, key, value in the layout, torch's own attention of them in it, in fp32)"""
    query, key, value = (random(B, HEADS, length, DIM, dtype=dtype) for length in (lengths[0], lengths[1], lengths[1]))
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    arranged = {"BNSD": lambda x: x, "BSND": lambda x: x.transpose(1, 2), "BSH": lambda x: x.transpose(1, 2).flatten(2)}
    return *(arranged[layout](x).contiguous() for x in (query, key, value)), arranged[layout](expected)


def lse_of(query, key):
    """[B, heads, S] of query and key [B, S, heads, D]."""
    scores = torch.einsum("bqnd,bknd->bnqk", query.float(), key.float()) * DIM**-0.5
    return scores.logsumexp(-1)


# Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_fusion_attention(random, layout, dtype):
    query, key, value, expected = qkv(random, layout, dtype)
    out, largest, total, *_ = as_meta(torch_npu.npu_fusion_attention, query, key, value, HEADS, layout,
                                      scale=DIM**-0.5)  # fmt: skip
    assert_close(out.float(), expected, **near(dtype))
    if layout == "BSND":
        assert_close(largest[..., 3] + total[..., 5].log(), lse_of(query, key), **near(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_fused_infer_attention_score(random, layout, dtype):
    query, key, value, expected = qkv(random, layout, dtype)
    options = {"num_heads": HEADS, "scale": DIM**-0.5, "input_layout": layout, "num_key_value_heads": HEADS}
    for with_lse in (False, True):
        out, lse = as_meta(torch_npu.npu_fused_infer_attention_score, query, key, value, **options,
                           softmax_lse_flag=with_lse)  # fmt: skip
        assert_close(out.float(), expected, **near(dtype))
    if layout == "BSND":
        assert_close(lse.squeeze(-1), lse_of(query, key), **near(dtype))


@pytest.mark.parametrize("name, dtype", [("fused_with_lse", torch.float32), ("infer_with_lse", torch.bfloat16)])
def test_attention_with_lse(random, name, dtype):
    """By the package's own functions."""
    from ascend_runtime.ops import ascend_attention  # noqa: PLC0415

    query, key, value, expected = qkv(random, "BSND", dtype)
    out, lse = getattr(ascend_attention, name)(query, key, value)
    assert_close(out.float(), expected, **near(dtype))
    assert_close(lse, lse_of(query, key).transpose(1, 2), **near(dtype))


@pytest.mark.parametrize("lengths", [(2048, 2048), (2100, 2300)])
@pytest.mark.parametrize("dtype", HALVES)
def test_laser_attention_by_mindiesd(random, calls, dtype, lengths):
    """By MindIE SD's own padding to 256 tokens, which the kernel masks, and 128 lanes."""
    before = calls.get("mindiesd::la", 0)
    query, key, value, expected = qkv(random, "BSND", dtype, lengths)
    options = {"scale": DIM**-0.5, "opt_mode": "manual", "op_type": "ascend_laser_attention", "layout": "BNSD"}
    out = mindiesd.attention_forward(query, key, value, **options)
    assert calls["mindiesd::la"] == before + 1
    assert out.dtype == dtype
    assert_close(out.float(), expected, atol=2e-2, rtol=1e-2)


def test_laser_attention_rounds_scores(random):
    """fp16 scores before they are scaled: beyond 65504 they are infinite."""
    query = torch.full((1, 1, 256, 128), 30.0, dtype=torch.float16)
    assert torch.ops.mindiesd.la(query, query, query, head_num=1, scale_value=128**-0.5)[1].isnan().all()
    query, key, value = (random(1, 1, 256, 128, dtype=torch.float16) for _ in range(3))
    lse, out = torch.ops.mindiesd.la(query, key, value, head_num=1, scale_value=128**-0.5)
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert 1e-6 < (out - exact).abs().max() < 1e-2
    scores = query.float() @ key.float().transpose(-1, -2) * 128**-0.5
    assert_close(lse, scores.logsumexp(-1), atol=1e-2, rtol=1e-2)


@pytest.mark.a5
@pytest.mark.parametrize("axis, shape", [(-1, (6, HEADS, 128)), (0, (70, HEADS, 5)), (1, (2, 33, 3))])
def test_dynamic_mx_quant(random, axis, shape):
    x = random(*shape) * random(*shape).exp()
    quantized, scales = as_meta(torch_npu.npu_dynamic_mx_quant, x, axis=axis, dst_type=torch.float8_e4m3fn)
    error = (cpu_kernels.dequantized(quantized, scales, axis) - x).abs()
    assert error.max() > 0
    for group, its_error in zip(x.split(32, axis), error.split(32, axis)):
        largest = group.abs().amax(axis, keepdim=True)  # of e4m3's 3 bits half a unit; beyond 448 of 512 it clips
        assert (its_error <= torch.maximum(group.abs() / 16, largest / 8)).all()
    powers = 2.0 ** torch.arange(-4, 4).repeat(4).reshape(1, 32)
    exact = torch_npu.npu_dynamic_mx_quant(powers, dst_type=torch.float8_e4m3fn)
    assert torch.equal(cpu_kernels.dequantized(*exact, -1), powers)


@pytest.mark.a5
def test_mxfp8_attention(random):
    """By the package's own function: the sequences of a batch do not see each other."""
    from ascend_runtime.ops.ascend_attention import fp8  # noqa: PLC0415

    query, key, value = (random(B, S, HEADS, 64, dtype=torch.bfloat16) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (query, key, value))).transpose(1, 2)
    out = fp8(query, key, value)
    error = (out.float() - expected).norm() / expected.norm()
    assert 1e-3 < error < 6e-2, f"MXFP8 is {error:.1%} off"


# W8A8


@pytest.mark.parametrize("dtype", HALVES)
def test_dynamic_quant(random, dtype):
    x = random(40, 96, dtype=dtype)
    rows, scale = as_meta(torch_npu.npu_dynamic_quant, x)
    assert torch.equal(rows.int().abs().amax(-1), torch.full((40,), 127, dtype=torch.int32))
    assert ((rows * scale.unsqueeze(-1) - x.float()).abs() <= 0.5001 * scale.unsqueeze(-1)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_smoothing_is_part_of_quantization(random, dtype):
    """The product is that of before, without its rounding to 16 bits: integers move by one at most."""
    x, smooth = random(40, 96, dtype=dtype), (random(96).abs() + 0.5).to(dtype)
    for of, limit in ((None, 127), (torch.quint4x2, 7)):
        rows, scale = as_meta(torch_npu.npu_dynamic_quant, x, smooth_scales=smooth, dst_type=of)
        rows = rows if of is None else cpu_kernels.of_int32(rows)
        exact = x.double() * smooth.double()
        assert_close(scale.double(), exact.abs().amax(-1) / limit, atol=0, rtol=1e-6)
        assert ((rows * scale.unsqueeze(-1) - exact).abs() <= 0.5001 * scale.unsqueeze(-1)).all()
        before, _ = torch_npu.npu_dynamic_quant(x * smooth, dst_type=of)
        assert (rows - (before if of is None else cpu_kernels.of_int32(before))).abs().max() <= 1


def test_pairs_are_what_the_wheel_packs(random, python_on):
    """By torch_npu's own code, which packs on the host, over a stub device; and by the stand-in's."""
    made = python_on("Ascend910B4", f"""
        import torch, torch_npu
        from ascend_runtime.ops.packing import int4_pairs
        x = torch.randint(-8, 8, (48, 64), generator=torch.Generator().manual_seed({SEED}), dtype=torch.int8)
        packed = torch_npu.npu_convert_weight_to_int4pack(x.to("npu", torch.int32)).cpu()
        print(torch.equal(packed, int4_pairs(x).view(torch.int32)), packed.numel(), packed.unique().numel() > 300)
    """)  # fmt: skip
    assert made == "True 384 True"
    from ascend_runtime.ops.packing import int4_pairs  # noqa: PLC0415

    x = (4 * random(48, 64)).round().clamp(-8, 7).to(torch.int8)
    assert torch.equal(cpu_kernels.in_int32(x), int4_pairs(x).view(torch.int32))
    assert torch.equal(cpu_kernels.of_int32(cpu_kernels.in_int32(x)), x.double())


def test_quantize(random):
    x, scale = random(40, 96).bfloat16().float(), torch.full((96,), 0.02)
    offset = torch.full((96,), 3, dtype=torch.int8)
    rows = as_meta(torch_npu.npu_quantize, x, scale, offset, torch.qint8, -1)
    exact = (x.double() / 0.02 + 3).clamp(-128, 127)
    assert ((rows - exact).abs() <= 0.5001).all() and rows.min() == -128 and rows.max() == 127


@pytest.mark.parametrize("bias", ["none", "of the dtype", "whole numbers"])
@pytest.mark.parametrize("dtype", HALVES)
def test_quant_matmul(random, dtype, bias):
    rows, weight = ((30 * random(*shape)).clamp(-127, 127).to(torch.int8) for shape in ((40, 96), (24, 96)))
    scale, row_scale = random(24).abs(), None if bias == "whole numbers" else random(40).abs()
    bias = {"none": None, "of the dtype": random(24).to(dtype), "whole numbers": (100 * random(24)).int()}[bias]
    out = as_meta(torch_npu.npu_quant_matmul, rows, weight.t(), scale, pertoken_scale=row_scale, bias=bias,
                  output_dtype=dtype)  # fmt: skip
    products = torch.einsum("mk,nk->mn", rows.double(), weight.double())
    if row_scale is None:
        expected = (products + bias) * scale
    else:
        expected = products * scale * row_scale.unsqueeze(-1) + (0 if bias is None else bias.double())
    assert_close(out.double(), expected.to(dtype).double(), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", HALVES)
def test_quantized_linears_are_those_of_the_cpu(random, calls, dtype):
    """By the package's own functions, with weights of which it made integers."""
    from ascend_runtime.ops import PlainOperators, ascend, quantization  # noqa: PLC0415
    from ascend_runtime.specs import OperatorSpec

    npu = ascend.AscendOperators(torch.device("cpu"), OperatorSpec(attention="fused"), dtype)
    x, bias = random(B, S, 96, dtype=dtype), random(24, dtype=dtype)
    weight, scale = quantization.quantized_rows(random(24, 96))
    static = quantization.Static(torch.tensor([0.03]), torch.tensor([-2.0]), 0.03 * scale.flatten(),
                                 (100 * random(24)).int())  # fmt: skip
    for name, arguments in (("quantized_linear", (scale.flatten(), bias)), ("static_linear", (static,))):
        made, expected = (getattr(ops, name)(x, weight, *arguments) for ops in (npu, PlainOperators()))
        assert made.shape == (B, S, 24) and made.dtype == dtype
        assert_close(made.float(), expected.float(), **near(dtype))
    assert {f"npu::npu_{name}" for name in ("dynamic_quant", "quantize", "quant_matmul")} <= calls.keys()


@pytest.mark.a5  # MXFP8
@pytest.mark.parametrize("width", [96, 128, 90])
@pytest.mark.parametrize("dtype", HALVES)
def test_linears_in_other_formats_are_those_of_the_cpu(random, calls, dtype, width):
    """MXFP8 also of a width that fills no pair of groups, 4 bits of multiples of 8."""
    from ascend_runtime.ops import PlainOperators, ascend, mxfp8, packing, quantization  # noqa: PLC0415
    from ascend_runtime.specs import OperatorSpec

    npu = ascend.AscendOperators(torch.device("cpu"), OperatorSpec(attention="fused"), dtype)
    x, bias, smooth = random(B, S, width, dtype=dtype), random(24), random(width, dtype=dtype)
    given = {"mx_linear": (*mxfp8.mx_quantized(random(24, width)), bias)}
    if width % 8 == 0:
        weight, scale = quantization.quantized_rows(random(24, width), limit=packing.INT4_MAX)
        given["int4_linear"] = (packing.int4_pairs(weight), scale.flatten(), bias.to(dtype))
        whole = torch.round(x.float() * 0 + 1).to(dtype)  # a smooth token, whose products are not rounded another way
        made, expected = (ops.int4_linear(whole, *given["int4_linear"], smooth) for ops in (npu, PlainOperators()))
        assert_close(made.float(), expected.float(), **near(dtype))
    for name, arguments in given.items():
        made, expected = (getattr(ops, name)(x, *arguments) for ops in (npu, PlainOperators()))
        assert made.shape == (B, S, 24) and made.dtype == dtype
        assert_close(made.float(), expected.float(), **near(dtype))
    assert {f"npu::npu_{name}" for name in ("dynamic_mx_quant", "quant_matmul")} <= calls.keys()


@pytest.mark.parametrize("card, experts, casts", [("a2", "resident", 36), ("a3", "resident", 36), ("a5", "resident", 0),
                                                  ("a2", "swap", 0)])  # fmt: skip
def test_int8_weights_are_laid_out_once_where_nothing_copies_to_them(
    checkpoints, calls, monkeypatch, card, experts, casts
):
    """Experts that take turns are copied from the host, and FSDP gathers copies: both keep torch's layout. A CPU's
    memory has no other; that an NPU's tensor has it afterwards is not shown here."""
    from ascend_runtime import DiffusionModelSpec, ops  # noqa: PLC0415
    from ascend_runtime.components import Components, diffusion_model
    from ascend_runtime.components.room import Room
    from ascend_runtime.hardware import devices
    from ascend_runtime.parallel.fsdp import Sharding

    monkeypatch.setenv(ops.OPERATORS_VARIABLE, "npu")
    monkeypatch.setattr(devices, "card", lambda device: card)
    folder, name = str(checkpoints(experts=2)), "npu::npu_format_cast"
    spec = DiffusionModelSpec(path=folder, dtype="bfloat16", quantization="w8a8_dynamic", experts=experts)
    before = calls.get(name, 0)
    model = Components(torch.device("cpu")).get(spec, lambda *_: None)
    assert calls.get(name, 0) - before == casts  # nine layers of two blocks of two experts
    layer = model.high_noise.blocks[0].attn1.to_q
    assert layer.weight.shape == (96, 96) and layer.weight.t().is_contiguous() == bool(casts)
    sharded = diffusion_model._Reader(torch.bfloat16, Room(torch.device("cpu"), Sharding(mesh=object()), None), None)
    assert sharded._laid_out(model.high_noise) is model.high_noise
    assert calls.get(name, 0) - before == casts


class Weights(dict):
    """What MindIE SD reads of a file."""

    get_tensor = dict.__getitem__


IN_MINDIE_SD = [(name, step, smoothed) for smoothed in (False, True) for name, step in (
    ("W8A8_DYNAMIC", None), ("W8A8", None), ("W8A8_TIMESTEP", None), ("W8A8_TIMESTEP", 2), ("W8A8_MXFP8", None),
)] + [("W4A4_DYNAMIC", None, False)]  # fmt: skip


@pytest.mark.parametrize("algorithm, step, smoothed", IN_MINDIE_SD)
def test_a_layer_is_mindie_sds(random, tmp_path, monkeypatch, algorithm, step, smoothed):
    """Its own classes, on the same file and stand-ins, in fp16, in which it keeps all scales in fp32. It leaves out the
    bias and the smoothing of 4-bit layers; so the file has neither."""
    import described_folders  # noqa: PLC0415
    from ascend_runtime.checkpoints import reader  # noqa: PLC0415
    from ascend_runtime.checkpoints.msmodelslim import read_description
    from ascend_runtime.models.shared.quantized import replacing, static
    from ascend_runtime.ops import PlainOperators, ascend
    from ascend_runtime.specs import OperatorSpec
    from mindiesd.quantization import layer as theirs
    from mindiesd.quantization.config import QuantConfig, TimestepPolicyConfig
    from mindiesd.quantization.utils import TimestepManager
    from safetensors.torch import load_file

    bias = algorithm != "W4A4_DYNAMIC"
    tensors = {"blocks.0.q.weight": random(48, 96), "blocks.0.q.bias": random(48) if bias else torch.zeros(48)}
    described_folders.write(tmp_path, tensors, algorithm, smoothed=smoothed)
    (file,), (described,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    prefix = "blocks.0.q.linear" if smoothed else "blocks.0.q"
    policy = TimestepPolicyConfig()
    policy.register(range(1, 4), "static", target="w8a8_static_linear")
    kinds = {"W8A8_TIMESTEP": theirs.W8A8TimeStepQuantLinear, "W8A8_MXFP8": theirs.W8A8MXFP8QuantLinear,
             "W4A4_DYNAMIC": theirs.W4A4QuantLinear}  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)
    weights = Weights(load_file(file))
    mindie = kinds.get(algorithm, theirs.W8A8QuantLinear)(
        96, 48, bias, weights, prefix, dtype=torch.float16, is_dynamic=algorithm != "W8A8",
        mul_scale=weights.get("blocks.0.q.div.mul_scale"), quant_config=QuantConfig(timestep_config=policy),
    )  # fmt: skip
    TimestepManager.set_timestep_idx(0 if step is None else step)

    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([torch.nn.Module()])
    with torch.device("meta"):
        network.blocks[0].q = torch.nn.Linear(96, 48)
    network.ops = PlainOperators()
    description = read_description(described).with_steps([file])
    replacing.quantize(network, description.renamed(lambda name: [name]), ("blocks.",))
    rename = lambda name, _: name.replace(".linear.", ".").replace(".div.", ".")  # noqa: E731
    places = reader.check_weights(network, (file,), rename, description)
    fixed = replacing.quantized_parameters(network)
    reader.load_weights(network, places, dtype_of=lambda name: fixed.get(name) or torch.float16,
                        device=torch.device("cpu"))  # fmt: skip
    static.use_step(network, step)
    x, layer = random(B, S, 96, dtype=torch.float16), network.blocks[0].q
    with torch.no_grad():
        expected = mindie(x)
        for ops in (PlainOperators(), ascend.AscendOperators(torch.device("cpu"), OperatorSpec(), torch.float16)):
            layer.ops = ops
            off = (layer(x).float() - expected.float()).abs().max() / expected.float().abs().max()
            print(f"\n{algorithm}, step {step}: {off:.1e} off MindIE SD's by {type(ops).__name__}")
            fused = smoothed and algorithm != "W8A8_MXFP8" and type(ops) is ascend.AscendOperators
            assert off <= (1e-2 if fused else 1e-3)  # MindIE SD rounds what it smoothed to fp16, which moves integers


# Norms


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(random, dtype):
    x, weight = random(B, S, 96, dtype=dtype), random(96, dtype=dtype)
    out, reciprocal = as_meta(torch_npu.npu_rms_norm, x, weight, epsilon=1e-6)
    assert_close(out.float(), F.rms_norm(x.float(), (96,), weight.float(), 1e-6), **near(dtype))
    assert_close(reciprocal.squeeze(-1), (x.float().square().mean(-1) + 1e-6).rsqrt(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_by_mindiesd(random, dtype, affine):
    x = random(B, S, 96, dtype=dtype) + 1
    weight, bias = (random(96, dtype=dtype), random(96, dtype=dtype)) if affine else (None, None)
    expected = F.layer_norm(x.float(), (96,), *(p if p is None else p.float() for p in (weight, bias)), 1e-6)
    layer = torch.nn.LayerNorm(96, 1e-6, elementwise_affine=affine, dtype=dtype)
    if affine:
        layer.weight.data, layer.bias.data = weight, bias
    with torch.no_grad():
        assert_close(mindiesd.fast_layernorm(layer, x).float(), expected, **near(dtype))
    as_meta(torch.ops.mindiesd.layernorm, x, [96], weight, bias, 1e-6)


@pytest.mark.parametrize("tokenwise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layernorm_scale_shift_by_mindiesd(random, calls, dtype, tokenwise):
    x = random(B, S, 96, dtype=dtype) + 1
    scale, shift = (random(B, S if tokenwise else 1, 96, dtype=dtype) for _ in range(2))
    before = calls.get("mindiesd::adaln", 0)
    norm = torch.nn.LayerNorm(96, 1e-6, elementwise_affine=False)
    out = mindiesd.layernorm_scale_shift(norm, x, scale, shift, fused=True)
    assert calls["mindiesd::adaln"] == before + 1, "an A2's"
    expected = F.layer_norm(x.float(), (96,), eps=1e-6) * (1 + scale.float()) + shift.float()
    assert_close(out.float(), expected, **near(dtype) | {"rtol": 2e-2})
    if not tokenwise:
        second = as_meta(torch.ops.mindiesd.adaln_v2, x, scale, shift, None, None, 1e-6)[0]
        assert torch.equal(second, as_meta(torch.ops.mindiesd.adaln, x, scale, shift, None, None, 1e-6))


# The rest of a block


def test_rotary_mul_of_pairs(random):
    x, angles = random(B, S, HEADS, DIM), random(1, S, 1, DIM // 2)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    out = as_meta(torch_npu.npu_rotary_mul, x, cos, sin, "interleave")
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    assert_close(out, torch.view_as_real(pairs).flatten(-2), atol=1e-5, rtol=0)


def test_rotary_in_bfloat16_is_as_exact_as_its_output(random):
    """By the package's own functions, over the 75600 tokens of a 14B's 1280 x 720 x 81: attention scores against
    float64. The other ways: of float32 query and key, and of the CPU."""
    from ascend_runtime.ops import PlainOperators, ascend  # noqa: PLC0415
    from ascend_runtime.specs import OperatorSpec
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    angles = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, 21, 90, 160))
    query, key = (random(1, angles[0].shape[1], 1, 128, dtype=torch.bfloat16) for _ in range(2))
    rows = torch.linspace(0, 75599, 64).long()

    def scores(rotate):
        turned_query, turned_key = (rotate(x)[0, :, 0].double() for x in (query, key))
        return turned_query[rows] @ turned_key.T * 128**-0.5

    def by(operators, dtype):
        table = operators.rotary_table(*angles)
        return scores(lambda x: operators.rotary(x.to(dtype), table).bfloat16())

    turns = torch.complex(*(part[..., 0::2].double() for part in angles))
    exact = scores(lambda x: torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns)
                   .flatten(-2))  # fmt: skip
    npus = {dtype: ascend.AscendOperators(torch.device("cpu"), OperatorSpec(attention="fused"), dtype)
            for dtype in (torch.bfloat16, torch.float32)}  # fmt: skip
    ways = {"bfloat16": by(npus[torch.bfloat16], torch.bfloat16), "float32": by(npus[torch.float32], torch.float32),
            "CPU": by(PlainOperators(), torch.bfloat16)}  # fmt: skip
    errors = {way: ((made - exact).square().mean().sqrt() / exact.std()).item() for way, made in ways.items()}
    print("\noff, in standard deviations of the scores:", {way: f"{error:.2e}" for way, error in errors.items()})
    assert 2.5e-3 < errors["bfloat16"] < 3e-3, "the figure of ops/precision.py"
    assert 2e-3 < errors["float32"] < 2.5e-3 and errors["CPU"] == pytest.approx(errors["float32"], rel=0.01)


def test_rotary_mul_of_halves(random):
    """Which Wan does not have, so the rules refuse it to the package."""
    x, angles = random(B, S, HEADS, DIM), random(1, S, 1, DIM // 2)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    numbers = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    out = cpu_kernels.rotary_mul(x, cos, sin, "half")
    assert_close(out, torch.cat((numbers.real, numbers.imag), -1), atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="interleaved"):
        torch_npu.npu_rotary_mul(x, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(random, dtype):
    x = 3 * random(B, S, 96, dtype=dtype)
    out = as_meta(torch_npu.npu_gelu, x, approximate="tanh")
    assert_close(out.float(), F.gelu(x.float(), approximate="tanh"), **near(dtype))
    fast = as_meta(torch_npu.npu_fast_gelu, x).float()
    assert 1e-3 < (fast - F.gelu(x.float())).abs().max() < 3e-2


def test_mm_all_reduce(tmp_path):
    """On two ranks, over Gloo: the sum, by parts of the rows. A bias is summed too, which is why the package adds its
    own afterwards."""
    code = f"""
import cpu_kernels, os, torch, torch.distributed as dist, torch_npu
from ascend_runtime.ops import ascend
from ascend_runtime.specs.jobs import OperatorSpec
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=RANK, world_size=2)
ascend._communicator = lambda group: group.group_name  # HCCL's name of a group, which Gloo has not
calls = []
cpu_kernels.register(calls.append)
generator = torch.Generator().manual_seed({SEED})
x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((2, 5, 64), (24, 64), (24,)))
mine, share = (part.chunk(2, -1)[RANK] for part in (x, weight))
spec = OperatorSpec(attention="fused", fused_all_reduce=True)
operators = ascend.AscendOperators(torch.device("cpu"), spec, torch.bfloat16)
operators.card = "a2"  # which has the fused operator
ascend.REDUCED_BYTES = 4 * 24 * 2  # four of the ten rows at once
out = operators.linear_all_reduce(mine, share, bias, dist.group.WORLD)
assert calls == ["npu::npu_mm_all_reduce_base"] * 3, calls
expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=2e-2)
twice = cpu_kernels.mm_all_reduce_base(mine, share.t(), dist.group.WORLD.group_name, "sum", bias)
torch.testing.assert_close(twice.float(), expected + bias.float(), atol=1e-1, rtol=2e-2)
dist.barrier()
os._exit(0)  # torch 2.7's Gloo, when it is destroyed, may wait for a thread that waits for the GIL
"""
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code.replace("RANK", str(rank))],
                              stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
             for rank in range(2)]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error[-3000:] for error in errors)


# What is refused


BAD = {
    "a layout that there is not": lambda q, f: torch_npu.npu_fusion_attention(q, q, q, HEADS, "BDSN", scale=f),
    "the heads of another layout": lambda q, f: torch_npu.npu_fusion_attention(q, q, q, HEADS, "BNSD", scale=f),
    "another number of heads": lambda q, f: torch_npu.npu_fusion_attention(q, q, q, HEADS + 1, "BSND", scale=f),
    "no scale": lambda q, f: torch_npu.npu_fusion_attention(q, q, q, HEADS, "BSND"),
    "two dtypes": lambda q, f: torch_npu.npu_fusion_attention(q, q.half(), q, HEADS, "BSND", scale=f),
    "dropout": lambda q, f: torch_npu.npu_fusion_attention(q, q, q, HEADS, "BSND", scale=f, keep_prob=0.5),
    "a mask, which no stand-in computes": lambda q, f: torch_npu.npu_fusion_attention(
        q, q, q, HEADS, "BSND", scale=f, atten_mask=torch.zeros(S, S, dtype=torch.bool)),
    "fp32 where halves are": lambda q, f: torch_npu.npu_fused_infer_attention_score(
        q, q, q, num_heads=HEADS, scale=f, input_layout="BSND"),
    "a gamma of another dtype": lambda q, f: torch_npu.npu_rms_norm(q, torch.ones(DIM).half()),
    "a rotary table of another shape": lambda q, f: torch_npu.npu_rotary_mul(
        q, *(torch.ones(S, 1, DIM // 2),) * 2, "interleave"),
    "a name that the schema has not": lambda q, f: torch_npu.npu_rms_norm(q, torch.ones(DIM), eps=1e-6),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(random, call):
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError)):
        call(random(B, S, HEADS, DIM), DIM**-0.5)


@pytest.mark.a5  # whose operators are among them
def test_every_stand_in_is_for_an_operator_with_rules():
    import operator_rules  # noqa: PLC0415

    for name in cpu_kernels.KERNELS:
        assert torch._C._dispatch_has_kernel(name), f"{name} is no operator of the wheels"
        assert name.partition("::")[2] in operator_rules.RULES
    assert Path(torch_npu.__file__).is_relative_to(sys.prefix)
