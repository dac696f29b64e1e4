"""The FLOPs that reports count with are those of a forward pass, as torch counts them."""

import pytest
import tiny_models
import torch
from ascend_runtime.accelerate.passes import Pass
from ascend_runtime.families.context import Context
from ascend_runtime.families.wan import WanTransformer
from ascend_runtime.families.work import work_of
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
    work = work_of(network.config, 3, shape[0], tokens, text, on_rank=tokens)

    def flops(*passing):
        spelt_out = sdpa_kernel(SDPBackend.MATH)  # torch does not count its CPU kernel
        with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
            network(latent, torch.full((shape[0],), 500.0), context, *passing)
        return counter.get_total_flops()

    flops()  # the first pass embeds the text besides
    whole = flops()
    attention = whole - flops(WithoutAttention())
    print(f"{whole:.4g} counted, {work.whole:.4g} by formula; attention {attention:.4g}, {3 * work.attention:.4g}")
    assert bool(context.keys_values) == kept
    assert whole == pytest.approx(work.whole, rel=0.02)
    assert attention == pytest.approx(3 * work.attention, rel=0.02)
