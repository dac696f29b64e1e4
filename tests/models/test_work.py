"""The FLOPs that reports count with are those of a forward pass, as torch counts them; its memory is what it takes."""

import pytest
import tiny_models
import torch
from ascend_runtime.models.shared.block_stack import Pass
from ascend_runtime.models.cost import PassSize
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanBlock, WanTransformer
from ascend_runtime.models.wan.cost import taken_by, work_of
from ascend_runtime.ops.memory import most_allocated
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.sequence import WholeSequence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = {
    "text": ({}, (1, 16, 3, 8, 10)),
    "two videos, wide": ({"num_attention_heads": 6, "ffn_dim": 512}, (2, 16, 2, 8, 12)),
    "images beside it": ({"in_channels": 36}, (1, 36, 3, 8, 8)),
}


class WithoutAttention(Pass):
    def attention(self, block, compute):
        return torch.zeros(())


@pytest.mark.parametrize("text, kept", [(40, True), (2, False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_computes_what_work_of_says(name, text, kept):
    """Whether the text's keys are kept, or projected anew in each pass."""
    changes, shape = CONFIGS[name]
    theirs = tiny_models.wan_transformer(seed=1, num_layers=3, **changes)
    network = WanTransformer(dict(theirs.config)).eval()
    network.load_state_dict(theirs.state_dict(), assign=True)
    latent, context = torch.randn(shape), Context(torch.randn(shape[0], text, tiny_models.TEXT_DIM))
    tokens = shape[2] * shape[3] * shape[4] // 4
    work = work_of(network.config, PassSize(shape[0], tokens, tokens, text))

    def flops(*passing):
        spelt_out = sdpa_kernel(SDPBackend.MATH)  # torch does not count its CPU kernel
        with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
            network(latent, torch.full((shape[0],), 500.0), context, *passing)
        return counter.get_total_flops()

    flops()  # the first pass embeds the text besides
    whole = flops()
    attention = whole - flops(WithoutAttention())
    expected = sum(block.attention for block in work.blocks)
    print(f"{whole:.4g} counted, {work.whole:.4g} by formula; attention {attention:.4g}, {expected:.4g}")
    assert bool(context.keys_values) == kept
    assert whole == pytest.approx(work.whole, rel=0.02)
    assert attention == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, ffn_dim", [(40, 13824), (24, 14336), (12, 8960)])
def test_a_block_takes_what_taken_by_says(heads, ffn_dim, dtype, per_token):
    """Blocks of the published sizes, on the meta device, with an attention that takes no more than its result."""
    config = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn_dim}
    tokens, width, operators = 32760, heads * 128, PlainOperators()
    operators.attention = lambda query, key, value: torch.empty_like(query)
    with torch.device("meta"):
        block = WanBlock(width, ffn_dim, heads).to(dtype)
        x, context = torch.empty(1, tokens, width, dtype=dtype), Context(torch.empty(1, 512, 0))
        context.embedded = torch.empty(1, 512, width, dtype=dtype), None
        timestep = torch.empty(1, *([tokens] if per_token else []), 6, width)
        rotary = (torch.empty(1, tokens, 1, 64),) * 2
    block.ops = block.attn1.ops = block.attn2.ops = operators
    block.attn1.sequence = WholeSequence(operators.attention)
    takes = most_allocated(lambda: block(x, context, timestep, rotary)) + (timestep.nbytes if per_token else 0)
    told = taken_by(config, PassSize(1, tokens, tokens, 512, per_token), dtype.itemsize)
    print(f"{takes / 1e9:.3f} GB taken, {told / 1e9:.3f} GB told")
    assert 0.85 * told < takes <= told
