"""(e) Each card played by its rules: every operator and exchange of the package has a row with its source, what the
package calls on a card is allowed there, and calls that are forbidden are caught.

Contract, not device: fake tensors on "npu", and a fake process group over which nothing is sent.
"""

import logging
import re
from itertools import chain

import call_sites
import operator_rules
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ascend_runtime.hardware import devices
from ascend_runtime.models.registry import family
from ascend_runtime.ops import card_rules, plain
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.parallel import cfg, tiles
from ascend_runtime.parallel.ring import Ring
from ascend_runtime.parallel.tensor import TensorParallel
from ascend_runtime.parallel.ulysses import Ulysses
from ascend_runtime.specs import OperatorSpec
from card_checks import CardChecks
from fake_stacks import MODELS, stack_of
from mindiesd.layers import adalayernorm
from mindiesd.utils.get_platform import NPUDevice
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import UMT5Config, UMT5EncoderModel

NPU = torch.device("npu", 0)
BF16, FP32 = torch.bfloat16, torch.float32
CARDS = list(card_rules.SERIES)
RANKS = 4
HEADS, HEAD_DIM, TOKENS = 8, 128, 64


@pytest.fixture
def play(monkeypatch):
    """`play(card)`: devices are such cards, and calls on fake tensors are held to its rules."""
    for once in (plain.log_once, plain.warn_once):
        once.cache_clear()

    def played(card):
        monkeypatch.setattr(devices, "card", lambda device: card)
        monkeypatch.setattr(adalayernorm, "npu_device", NPUDevice.A5 if card == "a5" else NPUDevice.A2)
        return CardChecks(card)

    with torch.no_grad():
        yield played


@pytest.fixture
def ranks():
    """A group of fake ranks, of which this process is the second."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta"):
        pytest.skip(f"torch {torch.__version__} has no collectives of fake tensors")
    dist.init_process_group("cpu:fake,npu:fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device=NPU)


def qkv(dtype=BF16, heads=HEADS, tokens=TOKENS):
    return [empty(1, tokens, heads, HEAD_DIM, dtype=dtype) for _ in range(3)]


# Rows


def operators_called():
    """The operators that the package calls by name, and those with CPU stand-ins."""
    dotted = (site.called.split(".") for site in call_sites.call_sites())
    named = {parts[-1] for parts in dotted if parts[0] == "mindiesd" or parts[-1].startswith("npu_")}
    return named | operator_rules.RULES.keys()


def test_every_operator_has_a_row_with_its_source_for_each_card():
    for name in sorted(operators_called()):
        assert name in card_rules.OPERATORS, f"{name} has no row in card_rules.py"
    assert len(operators_called()) > 20


def test_every_exchange_has_a_row_with_its_source_for_each_card():
    sites = call_sites.exchanges()
    for site in sorted(sites, key=str):
        assert site.called in card_rules.COLLECTIVES, f"{site} has no row in card_rules.py"
        assert card_rules.COLLECTIVES[site.called] in card_rules.HCCL
        print(site, card_rules.COLLECTIVES[site.called])
    assert {"all_to_all_single", "all_reduce", "batch_isend_irecv"} <= {site.called for site in sites}


def test_every_row_names_a_document_for_each_card():
    for name, rule in chain(card_rules.OPERATORS.items(), card_rules.HCCL.items()):
        assert rule.keys() == card_rules.SERIES.keys(), name
        for support in rule.values():
            assert re.fullmatch(r"(Ascend|hicann)/[\w-]+, [^,]+\.(md|cpp|py)", support.source), support.source


# What the package calls on each card


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", CARDS)
def test_a_block_calls_what_its_card_has(play, card, model):
    with FakeTensorMode(allow_non_fake_inputs=True), play(card) as checks:
        stack_of(model, depth=1).run()
    print(card, dict(checks.checked))
    assert checks.checked["npu_fused_infer_attention_score"] >= 2 and not checks.checked["npu_fusion_attention"]
    assert {"npu_rms_norm", "npu_rotary_mul", "npu_gelu", "native_layer_norm", "addmm"} <= checks.checked.keys()


@pytest.mark.parametrize("card", CARDS)
def test_a_text_encoder_on_the_ranks_calls_what_its_card_has(play, card):
    """It is transformers' own, with a bias of positions in its attention: torch_npu has no operator for that."""
    config = UMT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=32)
    with FakeTensorMode(allow_non_fake_inputs=True), play(card) as checks:
        with NPU:
            encoder = UMT5EncoderModel._from_config(config, dtype=BF16).eval()
        tokens, mask = (torch.zeros(1, 512, dtype=torch.int64, device=NPU) for _ in range(2))
        assert encoder(tokens, mask).last_hidden_state.shape == (1, 512, 64)
    print(card, dict(checks.checked))
    assert checks.checked and not [name for name in checks.checked if "attention" in name]


ENCODERS = {  # small ones, and what they read
    "text_encoder": ({"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                      "num_attention_heads": 4, "num_key_value_heads": 2}, (1, 351)),
    "text_encoder_2": ({"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                        "num_attention_heads": 4}, (1, 77)),
    "vision_tower": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "text_width": 64}, (1, 3, 336, 336)),
}  # fmt: skip


@pytest.mark.parametrize("part", ENCODERS)
@pytest.mark.parametrize("card", CARDS)
def test_encoders_of_texts_and_images_call_what_their_card_has(play, card, part):
    """Their attention is of plain operators."""
    config, shape = ENCODERS[part]
    network = family("hunyuan_video").network(part, config).to(BF16)
    given = {"vision_tower": (), "text_encoder": ({5: torch.empty(1, 576, 64, dtype=BF16, device=NPU)}, 9),
             "text_encoder_2": ()}[part]  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True), play(card) as checks:
        network = network.to_empty(device=NPU).eval()
        reads = torch.zeros(shape, dtype=BF16 if part == "vision_tower" else torch.int64, device=NPU)
        made = network(reads, *given)
    tokens = {"text_encoder": 926, "text_encoder_2": 77, "vision_tower": 576}
    assert made.shape == (1, tokens[part], 64)
    print(card, part, dict(checks.checked))
    assert checks.checked and not [name for name in checks.checked if "attention" in name]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("attention", ["auto", "fused", "infer", "laser", "fastest", "fp8", "plain"])
@pytest.mark.parametrize("card", CARDS)
def test_an_attention_is_one_that_its_card_has_or_is_refused(play, card, attention, dtype):
    with FakeTensorMode(), play(card) as checks:
        try:
            serves = AscendOperators(NPU, OperatorSpec(attention=attention), dtype)
        except ValueError as error:
            assert attention in str(error) and attention in ("infer", "laser", "fastest", "fp8")
            return
        query, key, value = qkv(dtype)
        assert serves.attention(query, key, value).dtype == dtype
        assert serves.attention(query, key[:, :16], value[:, :16]).dtype == dtype
        assert serves.attention_with_lse(query, key, value)[1].dtype == FP32
    print(card, attention, dtype, dict(checks.checked))
    assert checks.checked, "nothing was held to the rules"


@pytest.mark.parametrize("card", CARDS)
def test_exchanges_are_those_that_a_card_has(play, ranks, card):
    """Ulysses, ring, CFG, tensor parallelism and tiles, on fake ranks."""
    with FakeTensorMode(), play(card) as checks:
        serves = AscendOperators(NPU, OperatorSpec(), BF16)
        Ulysses(ranks).attention(serves.attention, *qkv())
        for exchange in ("rotate", "gather"):
            Ring(ranks, serves, exchange).attention(*qkv(), [TOKENS] * RANKS)
        cfg.computed(list(range(RANKS)), lambda call: empty(4), ranks)
        norm = torch.nn.RMSNorm(32, device="meta")
        norm.weight = torch.nn.Parameter(empty(32), requires_grad=False)
        TensorParallel(ranks).rms_norms(serves, 1e-6, (norm, empty(1, TOKENS, 32)))
        plain.PlainOperators().linear_all_reduce(empty(1, TOKENS, 32), empty(16, 32), None, ranks)
        for dtype in (BF16, FP32):
            tile = tiles.Tile(tiles.grid_here(16, 16), dist.get_rank(), ranks)
            tile.fill_edges(empty(1, 3, 2, 10, 10, dtype=dtype), (1, 1, 1, 1))()
            tile.gather(empty(1, 64, 8, dtype=dtype))
    print(card, dict(checks.checked))
    named = {card_rules.COLLECTIVES[site.called] for site in call_sites.exchanges()}
    assert named - {"HcclBatchSendRecv"} == checks.checked.keys() & card_rules.HCCL.keys()


# What is done where a card lacks an operator


def said(caplog):
    return [(record.levelno, record.getMessage()) for record in caplog.records if "attention" in record.getMessage()]


@pytest.mark.parametrize("attention", ["fused", "fastest"])
def test_an_a3_warns_and_infers_where_training_attention_is_asked_for(play, caplog, attention):
    """As ALGO=0 does, and workflows that were saved with it."""
    with FakeTensorMode(), play("a3") as checks, caplog.at_level(logging.INFO):
        for _ in range(2):
            AscendOperators(NPU, OperatorSpec(attention=attention), BF16).attention(*qkv())
    assert checks.checked.keys() == {"npu_fused_infer_attention_score"}
    ((level, text),) = said(caplog)
    assert level == logging.WARNING and f"attention is {attention!r}" in text and "'infer' is used instead" in text
    assert "the A3 series" in text


def test_float32_on_an_a3_is_computed_by_basic_operators_and_said(play, caplog):
    with FakeTensorMode(), play("a3") as checks, caplog.at_level(logging.INFO):
        AscendOperators(NPU, OperatorSpec(), FP32).attention(*qkv(FP32))
    assert checks.checked.keys() == {"matmul"}
    ((level, text),) = said(caplog)
    assert level == logging.INFO and "float32 on this card" in text and "slow" in text


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_torchs_own_operators_on_an_a3_leave_training_attention_out(play, dtype):
    """ASCEND_RUNTIME_OPERATORS=torch"""
    with FakeTensorMode(), play("a3") as checks:
        plain.PlainOperators().attention(*qkv(dtype))
    assert checks.checked.keys() == {"matmul"}
    with FakeTensorMode(), play("a2") as checks:
        plain.PlainOperators().attention(*qkv(dtype))
    assert {name.removesuffix("_v3") for name in checks.checked} == {"npu_fusion_attention"}


@pytest.mark.parametrize("card", ["a2", "a5"])
def test_float32_elsewhere_is_the_operator_for_training(play, caplog, card):
    with FakeTensorMode(), play(card) as checks, caplog.at_level(logging.INFO):
        AscendOperators(NPU, OperatorSpec(), FP32).attention(*qkv(FP32))
    assert checks.checked.keys() == {"npu_fusion_attention"} and not said(caplog)


def test_an_unknown_card_may_do_what_any_known_one_can(play, caplog):
    with FakeTensorMode(), play(None) as checks, caplog.at_level(logging.INFO):
        for dtype in (BF16, FP32):
            AscendOperators(NPU, OperatorSpec(), dtype).attention(*qkv(dtype))
        AscendOperators(NPU, OperatorSpec(attention="fused"), BF16).attention(*qkv())
    assert checks.checked == {"npu_fused_infer_attention_score": 1, "npu_fusion_attention": 2}
    lines = [record.getMessage() for record in caplog.records if "product line" in record.getMessage()]
    assert len(lines) == 1 and "is unknown" in lines[0]
    with pytest.raises(ValueError, match="takes? .*float32|does not work in float32 on any card"):
        card_rules.require_operator(None, "npu_fused_infer_attention_score", FP32, "")


# Planted violations


def attend_by_training(query, key, value):
    return torch.ops.npu.npu_fusion_attention(query, key, value, HEADS, "BSND", scale=HEAD_DIM**-0.5)


def attend_by_torch(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("attend", [attend_by_training, attend_by_torch])
def test_training_attention_on_an_a3_is_caught(play, attend):
    with FakeTensorMode(), play("a2"):
        attend(*qkv())
    with FakeTensorMode(), play("a3"), pytest.raises(ValueError, match="npu_fusion_attention.* the A3 series"):
        attend(*qkv())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("card, caught", [("a2", True), ("a3", True), ("a5", False)])
def test_a_strict_float32_convolution_is_caught(play, monkeypatch, card, caught, dims):
    convolve = {2: F.conv2d, 3: F.conv3d}[dims]
    before = torch.npu.conv.allow_hf32
    try:
        with FakeTensorMode():
            x, weight = empty(1, 4, *(8,) * dims, dtype=FP32), empty(4, 4, *(3,) * dims, dtype=FP32)
            torch.npu.conv.allow_hf32 = True
            with play(card):
                convolve(x, weight)
            torch.npu.conv.allow_hf32 = False
            with play(card) as checks:
                convolve(x.bfloat16(), weight.bfloat16())
                if caught:
                    with pytest.raises(ValueError, match="convolution_without_hf32 takes float16 and bfloat16"):
                        convolve(x, weight)
                else:
                    convolve(x, weight)
            assert checks.checked["convolution_without_hf32"] == (1 if caught else 2)
    finally:
        torch.npu.conv.allow_hf32 = before


def test_an_operator_without_a_row_is_caught(play):
    with FakeTensorMode(), play("a2"), pytest.raises(AssertionError, match="npu_swiglu has no row in card_rules.py"):
        torch.ops.npu.npu_swiglu(empty(4, 64))


def test_a_site_without_a_row_is_caught(monkeypatch):
    monkeypatch.delitem(card_rules.OPERATORS, "npu_gelu")
    with pytest.raises(AssertionError, match="npu_gelu has no row"):
        test_every_operator_has_a_row_with_its_source_for_each_card()
    monkeypatch.delitem(card_rules.COLLECTIVES, "all_to_all_single")
    with pytest.raises(AssertionError, match="ulysses.py.* all_to_all_single has no row"):
        test_every_exchange_has_a_row_with_its_source_for_each_card()


def test_a_dtype_that_hccl_does_not_sum_is_caught(play, ranks):
    with FakeTensorMode(), play("a3"), pytest.raises(AssertionError, match="HcclAllReduce .*float64 on a3"):
        dist.all_reduce(empty(4, dtype=torch.float64))
    with FakeTensorMode(), play("a5"):
        dist.all_reduce(empty(4, dtype=torch.float64))


def test_a_reduction_without_a_row_is_caught(play, ranks):
    with FakeTensorMode(), play("a2"), pytest.raises(AssertionError, match="reduce_scatter_ has no name"):
        dist.reduce_scatter(empty(4), [empty(4)] * RANKS)


@pytest.mark.a5
def test_heads_of_a_size_that_a_950_does_not_take_are_refused(play):
    query, mask = empty(1, 128, 2, 32), empty(1, 2, 1, 1, dtype=torch.bool)
    with play("a5"), pytest.raises(ValueError, match="v2 takes heads of 64 or 128 values, but this model's have 32"):
        AscendOperators(NPU, OperatorSpec(attention="fp8"), BF16).attention(query, query, query)
    with play("a5"), pytest.raises(ValueError, match="block_sparse_attention takes heads of 64 or 128"):
        AscendOperators(NPU, OperatorSpec(), BF16).sparse_attention(*[query.transpose(1, 2)] * 3, mask)


@pytest.mark.parametrize("heads, head_dim, words", [(257, 128, "257 heads .at most 256"), (2, 520, "520 values per"),
                                                    (2, 12, "12 values per head .a multiple of 8")])  # fmt: skip
def test_shapes_beyond_the_operators_limits_are_refused(play, heads, head_dim, words):
    with FakeTensorMode(), play("a2"):
        serves, query = AscendOperators(NPU, OperatorSpec(), BF16), empty(1, 64, heads, head_dim)
        with pytest.raises(ValueError, match=words):
            serves.attention(query, query, query)
