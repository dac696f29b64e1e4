"""The operators by torch's own means, against their formulas; and what a device that lacks one says."""

import logging
import os

import pytest
import torch
from ascend_runtime import ops
from ascend_runtime.ops import PlainOperators, operators_for, plain
from ascend_runtime.ops.plain import log_once
from ascend_runtime.specs import OperatorSpec
from torch.testing import assert_close

CPU = torch.device("cpu")
BATCH, TOKENS, TEXT, HEADS, HEAD_DIM = 2, 33, 17, 6, 16


@pytest.fixture
def draw():
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def formula(query, key, value):
    """Attention and its log-sum-exp [B, S, heads], as they are written down."""
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * HEAD_DIM**-0.5
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize("heads_per_call", [0, 1, 4, 6, 100])
@pytest.mark.parametrize("length", [TOKENS, TEXT])
def test_attention(draw, length, heads_per_call):
    serves = PlainOperators(OperatorSpec(heads_per_call=heads_per_call))
    query, (key, value) = draw(BATCH, TOKENS, HEADS, HEAD_DIM), draw(2, BATCH, length, HEADS, HEAD_DIM)
    expected, expected_lse = formula(query, key, value)
    assert_close(serves.attention(query, key, value), expected, atol=1e-5, rtol=1e-5)
    out, lse = serves.attention_with_lse(query, key, value)
    assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_attention_spelt_out_in_blocks_of_rows(draw, monkeypatch):
    """For devices on which torch does not tell the log-sum-exp."""
    query, (key, value) = draw(BATCH, TOKENS, HEADS, HEAD_DIM), draw(2, BATCH, TEXT, HEADS, HEAD_DIM)
    monkeypatch.setattr(plain, "SCORES", 3 * BATCH * HEADS * TEXT)  # three rows
    out, lse = plain.explicit_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    expected, expected_lse = formula(query, key, value)
    assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    assert_close(lse.transpose(1, 2), expected_lse, atol=1e-5, rtol=1e-5)


def test_parts_merge_by_their_log_sum_exp(draw):
    """What a ring will do: attention over two halves of the keys, made one."""
    serves = PlainOperators()
    query, (key, value) = draw(1, TOKENS, HEADS, HEAD_DIM), draw(2, 1, TOKENS, HEADS, HEAD_DIM)
    halves = [serves.attention_with_lse(query, key[:, part], value[:, part]) for part in (slice(10), slice(10, None))]
    outs, lses = (torch.stack(parts) for parts in zip(*halves))
    weights = (lses - lses.logsumexp(0)).exp().unsqueeze(-1)
    assert_close((outs * weights).sum(0), serves.attention(query, key, value), atol=1e-5, rtol=1e-5)


def test_bfloat16_attention_has_a_float32_log_sum_exp(draw):
    query = draw(1, TOKENS, HEADS, HEAD_DIM).bfloat16()
    out, lse = PlainOperators().attention_with_lse(query, query, query)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_close(lse, formula(*[query.float()] * 3)[1], atol=2e-2, rtol=2e-2)


def test_norms_and_gate(draw):
    serves, dim = PlainOperators(), 24
    x, update, row, weight = draw(BATCH, TOKENS, dim), draw(BATCH, TOKENS, dim), draw(BATCH, 1, dim), draw(dim)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert_close(serves.rms_norm(x, weight, 1e-6), rms * weight, atol=1e-5, rtol=1e-5)
    assert_close(serves.layer_norm(x, weight, row[0, 0], 1e-6), normed * weight + row[0, 0], atol=1e-5, rtol=1e-5)
    assert_close(serves.modulated_layer_norm(x, row, -row, 1e-6), normed * (1 - row) + row, atol=1e-5, rtol=1e-5)
    assert_close(serves.gated_add(x, update, row), x + update * row, atol=1e-5, rtol=1e-5)


def test_rotary_turns_pairs(draw):
    serves = PlainOperators()
    x, angle = draw(BATCH, TOKENS, HEADS, HEAD_DIM), draw(1, TOKENS, 1, HEAD_DIM // 2)
    cos, sin = (f(angle).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    assert_close(serves.rotary(x, serves.rotary_table(cos, sin)), turned.flatten(-2), atol=1e-5, rtol=1e-5)


# What is refused, and what is said


def test_fp8_attention_is_refused_by_name():
    with pytest.raises(ValueError, match="'fp8'.*950 series.*'auto'"):
        operators_for(CPU, OperatorSpec(attention="fp8"), torch.float32)


def test_an_npus_attention_is_torchs_here_and_the_log_says_so_once(caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="ascend_runtime"):
        for _ in range(3):
            serves = operators_for(CPU, OperatorSpec(attention="laser"), torch.float32)
    assert type(serves) is PlainOperators
    assert [record.message for record in caplog.records] == [
        "attention 'laser' is only available on NPUs; torch's attention is used instead."
    ]


def test_a_wrong_way_is_refused(monkeypatch):
    monkeypatch.setenv(ops.OPERATORS_VARIABLE, "fast")
    with pytest.raises(ValueError, match="ASCEND_RUNTIME_OPERATORS is 'fast'.*auto, npu, torch"):
        operators_for(CPU, OperatorSpec(), torch.float32)
