"""(a) Every call of the package into torch_npu and mindiesd is made here, against the real wheels' schemas.

Contract, not device: the arguments are bound to the schema, held against operator_rules.py, and handed to the wheels'
own meta kernels as fake tensors on "npu".
"""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import call_sites
import operator_rules
import pytest
import torch
from ascend_runtime.hardware import devices
from ascend_runtime import ops
from ascend_runtime.engine import profiling
from ascend_runtime.ops import PlainOperators, ascend, ascend_attention, libraries
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.ops.plain import log_once
from ascend_runtime.ops.quantization import Static
from ascend_runtime.specs import OperatorSpec, ProfileSpec
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NPU = torch.device("npu", 0)
NOTED = set()
HEADS, HEAD_DIM, TOKENS, TEXT = 40, 128, 4096, 512
DIM = HEADS * HEAD_DIM
EPS = 1e-6


def answer(dotted, function, arguments, keywords):
    """Checks the arguments of a call by the rules of the card that is played, and makes it."""
    name = dotted.rpartition(".")[2]
    if dotted.startswith("torch_npu.npu_"):
        schema = getattr(torch.ops.npu, name).default._schema
        operator_rules.check(name, operator_rules.by_schema(schema, arguments, keywords), devices.card(NPU))
        if name == "npu_format_cast":  # has no meta kernel, and a fake tensor no such format
            return arguments[0].clone()
    elif dotted.startswith("mindiesd."):
        bound = inspect.signature(function).bind(*arguments, **keywords)
        bound.apply_defaults()
        operator_rules.check(name, bound.arguments, devices.card(NPU))
    elif name == "profile":
        assert {activity.name for activity in keywords["activities"]} == {"CPU", "NPU"}
    return function(*arguments, **keywords)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The package's libraries, with a recorder before them."""
    torch_npu = call_sites.Recorded(libraries.torch_npu(), "torch_npu", NOTED, answer)
    mindiesd = call_sites.Recorded(libraries.mindiesd(), "mindiesd", NOTED, answer)
    for module in (ascend, ascend_attention, profiling):
        monkeypatch.setattr(module, "torch_npu", lambda: torch_npu)
        if hasattr(module, "mindiesd"):
            monkeypatch.setattr(module, "mindiesd", lambda: mindiesd)
    monkeypatch.setattr(torch, "npu", call_sites.Recorded(torch.npu, "npu", NOTED, answer))


@pytest.fixture
def fake():
    ascend_attention._hadamard.cache_clear()  # what it keeps is fake, and of one mode
    with FakeTensorMode(), torch.no_grad():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device=NPU)


class Operators(TorchDispatchMode):
    """Notes the arguments of every operator: name -> those of each call."""

    def __enter__(self):
        self.called = defaultdict(list)
        super().__enter__()
        return self.called

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.called[operator.name()].append(arguments)
        return operator(*arguments, **(keywords or {}))


def operators(dtype=torch.bfloat16, **options):
    return AscendOperators(NPU, OperatorSpec(**options), dtype)


@pytest.fixture
def on_card(monkeypatch):
    return lambda line: monkeypatch.setattr(devices, "card", lambda device: line)


# Attention

WAYS = [*(("a2", name) for name in ("auto", "fused", "infer", "laser", "fastest", "plain")),
        *(("a3", name) for name in ("auto", "fused", "infer", "laser", "fastest", "plain")),
        *(("a5", name) for name in ("auto", "fused", "infer", "fp8", "plain"))]  # fmt: skip


@pytest.mark.parametrize("heads_per_call", [0, 12])
@pytest.mark.parametrize("card, attention", WAYS)
def test_attention(fake, on_card, card, attention, heads_per_call):
    on_card(card)
    serves = operators(attention=attention, heads_per_call=heads_per_call)
    query, text = fake(2, TOKENS, HEADS, HEAD_DIM), fake(2, TEXT, HEADS, HEAD_DIM)
    for key in (query, text):
        out = serves.attention(query, key, key)
        assert out.shape == query.shape and out.dtype == query.dtype and out.device == NPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_with_lse(fake, dtype):
    query = fake(1, TOKENS, HEADS, HEAD_DIM, dtype=dtype)
    text = fake(1, TEXT, HEADS, HEAD_DIM, dtype=dtype)
    for key in (query, text):
        out, lse = operators(dtype).attention_with_lse(query, key, key)
        assert out.shape == query.shape and out.dtype == dtype
        assert lse.shape == (1, TOKENS, HEADS) and lse.dtype == torch.float32


@pytest.mark.parametrize("card, attention", [("a2", "plain"), ("a3", "plain"), ("a2", "torch")])
def test_attention_with_lse_where_no_fused_operator_tells_it(fake, on_card, card, attention):
    """Also torch's own, of whose fused ones an NPU has none."""
    on_card(card)
    query, key = (fake(1, n, HEADS, HEAD_DIM, dtype=torch.float16) for n in (TOKENS, TEXT))
    serves = PlainOperators() if attention == "torch" else operators(torch.float16, attention=attention)
    noted = set(NOTED)
    out, lse = serves.attention_with_lse(query, key, key)
    assert out.shape == query.shape and out.dtype == query.dtype
    assert lse.shape == (1, TOKENS, HEADS) and lse.dtype == torch.float32
    assert NOTED == noted


def test_attention_of_parts_that_are_not_contiguous(fake):
    """As they leave an all-to-all over heads."""
    packed = fake(3, 1, TOKENS, HEADS, 2, HEAD_DIM).select(4, 0)
    for attention in ("fused", "infer"):
        assert operators(attention=attention).attention(*packed.unbind()).shape == (1, TOKENS, HEADS, HEAD_DIM)


REFUSED = [
    ("a2", "fp8", torch.bfloat16, "takes float16 and bfloat16 on cards of the A2 series, not float8_e4m3fn"),
    ("a3", "fp8", torch.bfloat16, "v2 takes float16 and bfloat16 on cards of the A3 series, not float8_e4m3fn"),
    ("a5", "laser", torch.bfloat16, "does not work in bfloat16 on cards of the 950 series. It is for cards of the A2"),
    *(("a2", name, torch.float32, "bfloat16 and float16") for name in ("laser", "infer", "fastest")),
]


@pytest.mark.parametrize("card, attention, dtype, words", REFUSED)
def test_what_a_card_or_dtype_cannot_do_is_refused(on_card, card, attention, dtype, words):
    on_card(card)
    with pytest.raises(ValueError, match=words):
        operators(dtype, attention=attention)


@pytest.mark.parametrize("card", ["a2", "a3", "a5"])
def test_sparse_attention(fake, on_card, card):
    on_card(card)
    serves, query = operators(), fake(2, HEADS, TOKENS + 5, HEAD_DIM)
    serves.check_sparse()
    blocks = -(-query.shape[2] // 128)
    pattern = serves.sparse_pattern(fake(2, HEADS, blocks, blocks, dtype=torch.bool))
    out = serves.sparse_attention(query, query, query, pattern)
    assert out.shape == query.shape and out.dtype == query.dtype and out.device == NPU


@pytest.mark.parametrize("dtype, library, words", [
    (torch.float32, True, "dtype is float32. Set dtype to one of these"),
    (torch.bfloat16, False, "Install the mindiesd"),
])  # fmt: skip
def test_sparse_attention_is_refused_where_no_operator_computes_it(monkeypatch, dtype, library, words):
    serves = operators(dtype)
    if not library:
        monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    with pytest.raises(ValueError, match=words):
        serves.check_sparse()


@pytest.mark.parametrize("attention", ["laser", "fastest"])
def test_without_mindiesd_its_attentions_are_refused(monkeypatch, attention):
    monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    with pytest.raises(ValueError, match="Install the mindiesd"):
        operators(attention=attention)


def test_the_way_is_the_devices_unless_a_variable_asks_for_another(monkeypatch):
    for way, expected in ((None, AscendOperators), ("npu", AscendOperators), ("torch", PlainOperators)):
        variable = ops.OPERATORS_VARIABLE
        monkeypatch.setenv(variable, way) if way else monkeypatch.delenv(variable, raising=False)
        assert type(ops.operators_for(NPU, OperatorSpec(), torch.bfloat16)) is expected


# Norms, rotary, linear


@pytest.mark.parametrize("library", ["mindiesd", "torch_npu alone"])
@pytest.mark.parametrize("batch, modulated", [(1, 1), (2, 1), (1, TOKENS), (2, TOKENS)])
def test_norms(fake, monkeypatch, library, batch, modulated):
    if library != "mindiesd":
        monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    serves, x = operators(), fake(batch, TOKENS, DIM)
    row = fake(batch, modulated, DIM, dtype=torch.float32)
    weight = fake(DIM, dtype=torch.float32)
    for out in (serves.rms_norm(x, weight, EPS), serves.layer_norm(x, weight, weight, EPS),
                serves.modulated_layer_norm(x, row, row, EPS), serves.gated_add(x, x, row)):  # fmt: skip
        assert out.shape == x.shape and out.dtype == x.dtype and out.device == NPU


def test_the_exact_layer_norm_is_torchs(fake):
    before = set(NOTED)
    NOTED.clear()
    serves, x, row = operators(layer_norm="fp32"), fake(1, TOKENS, DIM), fake(1, 1, DIM, dtype=torch.float32)
    assert serves.modulated_layer_norm(x, row, row, EPS).dtype == x.dtype
    assert serves.layer_norm(x, row.flatten(), row.flatten(), EPS).dtype == x.dtype
    assert not [called for *_, called in NOTED if "norm" in called]
    NOTED.update(before)


@pytest.mark.parametrize("batch", [1, 2, 25])
def test_rotary(fake, batch):
    serves, x = operators(), fake(batch, 64, HEADS, HEAD_DIM)
    table = serves.rotary_table(*(fake(1, 64, 1, HEAD_DIM, dtype=torch.float64) for _ in range(2)))
    assert serves.rotary(x, table).shape == x.shape and serves.rotary(x, table).dtype == x.dtype


def test_gelu(fake):
    assert operators().gelu(fake(1, TOKENS, 13824)).shape == (1, TOKENS, 13824)


@pytest.fixture
def on_two_ranks(monkeypatch):
    """A group of two ranks of HCCL: a fake, a name. The all-reduces of torch that were called on it."""
    summed, backend = [], SimpleNamespace(get_hccl_comm_name=lambda rank: f"communicator of rank {rank}")
    monkeypatch.setattr(ascend.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(ascend.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ascend.dist, "all_reduce", lambda x, *_, group: summed.append(x.shape))
    return SimpleNamespace(_get_backend=lambda device: backend), summed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by", ["spec", "variable"])
def test_linear_all_reduce_by_one_operator(fake, monkeypatch, on_two_ranks, bias, by):
    if by == "variable":
        monkeypatch.setenv(ascend.FUSED_ALL_REDUCE_VARIABLE, "1")
    group, summed = on_two_ranks
    x, weight = fake(2, 75600, DIM // 2), fake(DIM, DIM // 2)
    with Operators() as called:
        out = operators(fused_all_reduce=by == "spec").linear_all_reduce(x, weight, fake(DIM) if bias else None, group)
    assert out.shape == (2, 75600, DIM) and out.dtype == x.dtype and not summed
    parts = [arguments[0].shape[0] for arguments in called["npu::npu_mm_all_reduce_base"]]
    assert sum(parts) == 2 * 75600 and max(parts) * DIM * 2 <= ascend.REDUCED_BYTES and len(parts) == 12


@pytest.mark.parametrize("card, dtype, options", [
    ("a2", torch.bfloat16, {}),
    ("a3", torch.bfloat16, {"fused_all_reduce": True}),
    ("a2", torch.float32, {"fused_all_reduce": True}),
], ids=["by default", "on an A3", "in float32"])  # fmt: skip
def test_linear_and_all_reduce_one_after_the_other(fake, on_card, on_two_ranks, caplog, card, dtype, options):
    on_card(card)
    log_once.cache_clear()
    group, summed = on_two_ranks
    x, weight = fake(1, TOKENS, DIM // 2, dtype=dtype), fake(DIM, DIM // 2, dtype=dtype)
    with caplog.at_level("INFO"):
        operators(dtype, **options).linear_all_reduce(x, weight, None, group)
    assert summed == [(1, TOKENS, DIM)]
    assert ("needs A2 cards" in caplog.text) == bool(options)


def test_a_bad_variable_of_the_all_reduce(monkeypatch):
    monkeypatch.setenv(ascend.FUSED_ALL_REDUCE_VARIABLE, "yes")
    with pytest.raises(ValueError, match="FUSED_ALL_REDUCE is 'yes'; it can be 1 .* or 0"):
        operators()


@pytest.fixture
def quantized(fake):
    """(x, weight, scale, bias, what is static) of a layer, as it is kept."""
    scale = fake(DIM, 1, dtype=torch.float32).flatten()
    numbers = [fake(1, dtype=torch.float32) for _ in range(2)]
    static = Static(*numbers, scale, fake(DIM, dtype=torch.int32))
    return fake(2, TOKENS, DIM), fake(DIM, DIM, dtype=torch.int8), scale, fake(DIM), static


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_linears(quantized, dtype, bias):
    x, weight, scale, given, static = quantized
    x, given = x.to(dtype), given.to(dtype) if bias else None
    for out in (operators(dtype).quantized_linear(x, weight, scale, given),
                operators(dtype).quantized_linear(x, weight, scale, given, torch.empty_like(x[0, 0])),
                operators(dtype).static_linear(x, weight, static)):  # fmt: skip
        assert out.shape == x.shape and out.dtype == dtype and out.device == NPU


def test_quantized_linears_that_are_summed(quantized, monkeypatch):
    x, weight, scale, bias, static = quantized
    summed = []
    monkeypatch.setattr("ascend_runtime.ops.plain.dist.all_reduce", lambda x, *_, group: summed.append(x.shape))
    half, weight = x[..., : DIM // 2], weight[:, : DIM // 2].contiguous()
    for out in (operators().quantized_linear_all_reduce(half, weight, scale, bias, None),
                operators().static_linear_all_reduce(half, weight, static, None)):  # fmt: skip
        assert out.shape == x.shape and out.dtype == x.dtype
    assert summed == [(2, TOKENS, 1), (2, TOKENS, DIM), (2, TOKENS, DIM)]


FORMATS = {  # the card, and the parameters of a layer [out, in] by their names
    "int4": ("a2", lambda out, width: ((out, width // 2, torch.int8), (out, None, torch.float32))),
    "mx": ("a5", lambda out, width: ((out, width, torch.uint8), (out, -(-width // 32), torch.uint8))),
}


@pytest.mark.parametrize("width", [DIM, 96])  # 96 inputs have three groups, which are given in pairs
@pytest.mark.parametrize("name", FORMATS)
def test_linears_in_other_formats(fake, on_card, monkeypatch, name, width):
    card, parts = FORMATS[name]
    on_card(card)
    (out, inner, dtype), (_, groups, kept) = parts(DIM, width)
    weight, scale = fake(out, inner, dtype=dtype), fake(*(n for n in (out, groups) if n), dtype=kept)
    weight = weight.view(torch.float8_e4m3fn) if name == "mx" else weight
    x, bias = fake(2, TOKENS, width), fake(DIM, dtype=torch.float32 if name == "mx" else torch.bfloat16)
    serves, summed = operators(), []
    monkeypatch.setattr("ascend_runtime.ops.plain.dist.all_reduce", lambda x, *_, group: summed.append(x.shape))
    smooth = [fake(width)] if name == "int4" else []
    for made in (getattr(serves, f"{name}_linear")(x, weight, scale, bias, *smooth),
                 getattr(serves, f"{name}_linear")(x, weight, scale, None),
                 getattr(serves, f"{name}_linear_all_reduce")(x, weight, scale, bias, None)):  # fmt: skip
        assert made.shape == (2, TOKENS, DIM) and made.dtype == x.dtype and made.device == NPU
    assert summed == [(2, TOKENS, 1)] * (name == "int4") + [(2, TOKENS, DIM)]


@pytest.mark.parametrize("card", ["a2", "a3", "a5"])
def test_int8_weights_are_laid_out_for_the_operator(fake, on_card, monkeypatch, card):
    """Once, after loading: as [K, N] in FRACTAL_NZ on A2 and A3 cards, which it takes untransposed."""
    on_card(card)
    weight = fake(DIM, DIM // 2, dtype=torch.int8)
    for variable, changed in (("auto", card != "a5"), ("torch", False)):
        monkeypatch.setenv(ops.LAYOUT_VARIABLE, variable)
        laid_out = ops.in_preferred_layout(weight)
        assert laid_out.shape == weight.shape and laid_out.t().is_contiguous() == changed
        assert (laid_out is weight) != changed
        out = operators().quantized_linear(fake(2, 4, DIM // 2), laid_out, fake(DIM, dtype=torch.float32), None)
        assert out.shape == (2, 4, DIM)


W8A8 = ("W8A8", "W8A8_DYNAMIC", "W8A8_TIMESTEP")


def test_where_nothing_is_quantized(on_card, monkeypatch):
    for card, more in (("a2", "W4A4_DYNAMIC"), ("a3", "W4A4_DYNAMIC"), ("a5", "W8A8_MXFP8")):
        on_card(card)
        ops.check_quantized(NPU, torch.bfloat16, (*W8A8, more))
    with pytest.raises(ValueError, match="bfloat16 or float16, but the model's dtype is float32"):
        ops.check_quantized(NPU, torch.float32, W8A8)
    monkeypatch.setenv(ops.OPERATORS_VARIABLE, "torch")
    with pytest.raises(ValueError, match="'torch', which has no quantized linear layers on an NPU"):
        ops.check_quantized(NPU, torch.bfloat16, W8A8)
    ops.check_quantized(torch.device("cpu"), torch.float32, (*W8A8, "W8A8_MXFP8", "W4A4_DYNAMIC"))
    monkeypatch.setenv(ops.LAYOUT_VARIABLE, "nz")
    with pytest.raises(ValueError, match="ASCEND_RUNTIME_WEIGHT_LAYOUT is 'nz'; it can be one of auto, torch"):
        ops.check_quantized(NPU, torch.bfloat16, W8A8)


@pytest.mark.parametrize("card, name, words", [
    ("a2", "W8A8_MXFP8", "only cards of the 950 series compute; this card is of the A2 series"),
    ("a3", "W8A8_MXFP8", "only cards of the 950 series compute; this card is of the A3 series"),
    ("a5", "W4A4_DYNAMIC", "only cards of the A2 series and the A3 series compute; this card is of the 950 series"),
])  # fmt: skip
def test_formats_that_a_card_does_not_compute_are_refused(on_card, card, name, words):
    on_card(card)
    with pytest.raises(ValueError, match=f"quantized as {name}, which {words}. Load the model's W8A8_DYNAMIC"):
        ops.check_quantized(NPU, torch.bfloat16, [name])


# Device and profiler, over the stub CANN


def test_a_device_is_taken():
    assert devices.take("npu", 0) == NPU
    assert torch.npu.current_device() == 0
    devices.card.cache_clear()
    assert devices.card(NPU) == "a2" and devices.default_dtype(NPU) == torch.bfloat16
    devices.synchronise(NPU)
    devices.empty_cache(NPU)
    assert devices.room(NPU) >= devices.free_memory(NPU) > 0
    devices.forget_peak(NPU)
    assert devices.name(NPU) == torch.npu.get_device_name(0)
    before, kept = devices.peak_memory(NPU), torch.empty(2**26, device=NPU)
    assert devices.peak_memory(NPU) >= before + kept.nbytes // 2
    copies = devices.SideStream(NPU)
    with copies.after_now():
        assert torch.npu.current_stream(NPU) != torch.npu.default_stream(NPU)
    copies.join()


def test_steps_are_recorded(tmp_path):
    recorder = profiling.Recorder(ProfileSpec(folder=str(tmp_path), first_step=1, last_step=1), NPU, 0)
    with recorder.step(1):
        pass


# The sum


@pytest.mark.a5  # whose calls are among them
def test_every_call_site_was_exercised():
    """Last in the file, as it looks back on all others."""
    exercised, unknown = call_sites.made(NOTED)
    sites = call_sites.call_sites()
    for site in sorted(sites, key=str):
        print(f"{'called' if site in exercised else 'NEVER '} {site}")
    print(f"{len(exercised)} of {len(sites)} calls")
    assert not unknown, f"calls that the search in the syntax trees is blind to: {unknown}"
    assert sites and exercised == sites


def test_the_rules_see_what_meta_kernels_let_pass(fake):
    x = fake(1, 64, HEADS, HEAD_DIM)
    torch.ops.npu.npu_fusion_attention(x, x, x, HEADS, "NONSENSE")
    with pytest.raises(AssertionError, match="NONSENSE"):
        answer("torch_npu.npu_fusion_attention", None, (x, x, x, HEADS, "NONSENSE"), {"scale": HEAD_DIM**-0.5})
    with pytest.raises(AssertionError, match="missing"):
        answer("torch_npu.npu_fusion_attention", None, (x, x, x), {})
    with pytest.raises(AssertionError, match="softmax_scale"):
        answer("torch_npu.npu_fusion_attention", None, (x, x, x, HEADS, "BSND"), {"softmax_scale": 1.0})
