"""The FLOPs that reports count with are those of a forward pass, as torch counts them; its memory is what it takes."""

import pytest
import random_hunyuan
import tiny_models
import torch
from ascend_runtime.models.hunyuan_video import cost as hunyuan_cost
from ascend_runtime.models.shared.block_stack import Pass
from ascend_runtime.models.cost import PassSize
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan.cost import work_of
from ascend_runtime.models.wan.weights import RULES
from ascend_runtime.ops.memory import allocated
from ascend_runtime.planner.holding.dry_job import DryNetwork, DryRank, DryVideo
from ascend_runtime.planner.holding.dry_pass import run
from ascend_runtime.planner.holding.passes import as_json
from ascend_runtime.specs import Plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CONFIGS = {
    "text": ({}, (1, 16, 3, 8, 10)),
    "two videos, wide": ({"num_attention_heads": 6, "ffn_dim": 512}, (2, 16, 2, 8, 12)),
    "images beside it": ({"in_channels": 36}, (1, 36, 3, 8, 8)),
}


class Reused(Pass):
    """Keeps each block's attention from the first pass on."""

    def __init__(self):
        self.kept = {}

    def attention(self, block, compute):
        if block not in self.kept:
            self.kept[block] = compute(None)
        return self.kept[block]


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

    def compute(*passing):
        network(latent, torch.full((shape[0],), 500.0), context, *passing)

    with torch.no_grad():
        compute()  # the first pass embeds the text besides
    assert bool(context.keys_values) == kept
    check_flops(compute, work, within=0.02)


def check_flops(compute, work, within):
    """compute: (a pass's decisions) -> a forward."""

    def flops(*passing):
        spelt_out = sdpa_kernel(SDPBackend.MATH)  # torch does not count its CPU kernel
        with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
            compute(*passing)
        return counter.get_total_flops()

    whole, passing = flops(), Reused()
    flops(passing)
    attention = whole - flops(passing)
    expected = sum(block.attention for block in work.blocks)
    print(f"{whole:.8g} counted, {work.whole:.8g} by formula; attention {attention:.8g}, {expected:.8g}")
    assert whole == pytest.approx(work.whole, rel=within)
    assert attention == pytest.approx(expected, rel=within)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "mlp_ratio": 3.0, "num_refiner_layers": 1}])
@pytest.mark.parametrize("kind", random_hunyuan.KINDS)
def test_a_pass_of_hunyuan_video_computes_what_work_of_says(kind, changes):
    network = random_hunyuan.ours(random_hunyuan.transformer(kind, **changes))
    given = random_hunyuan.inputs(network.config, (3, 8, 10), 9, batch=2)
    work = hunyuan_cost.work_of(network.config, PassSize(2, 60, 69, 9))
    check_flops(lambda *passing: random_hunyuan.velocity(network, given, *passing), work, within=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, ffn_dim", [(40, 13824), (12, 8960)])
def test_a_pass_of_the_published_sizes_takes_memory_in_proportion_to_its_tokens(heads, ffn_dim, dtype, per_token):
    """In units of a block's output: what self-attention or the feed-forward take, and vectors for each token."""
    config = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn_dim, "num_layers": 3,
              "patch_size": (1, 2, 2), "in_channels": 48, "out_channels": 48}  # fmt: skip
    network = DryNetwork(family("wan"), as_json(config), str(dtype).removeprefix("torch."), frozenset(), 1)
    one, more = (
        run(network, DryVideo((1, 48, frames, 60, 104), 512, per_token, 1), DryRank("npu", Plan(), 0, "rotate", False))
        for frames in (7, 21)
    )
    outputs = more.blocks / more.output
    print(f"{outputs:.2f} outputs of a block, {more.context / 1e6:.0f} MB of context")
    assert 2.9 < more.blocks / one.blocks < 3.1 and more.output == 21 * 30 * 52 * heads * 128 * dtype.itemsize
    vectors = 12 * 4 / dtype.itemsize if per_token else 0
    assert 0.7 < outputs / (vectors + max(12, 4 + 2 * ffn_dim / heads / 128)) < 1.6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dry_pass_takes_what_a_real_one_takes(name, dtype):
    """The tensors that our network makes of real ones on a CPU, within 3 %."""
    changes, shape = CONFIGS[name]
    theirs = tiny_models.wan_transformer(seed=1, num_layers=3, **changes)
    network = WanTransformer(dict(theirs.config)).eval()
    network.load_state_dict(theirs.state_dict(), assign=True)
    for parameter in network.named_parameters():
        parameter[1].data = parameter[1].data if RULES.fp32(parameter[0]) else parameter[1].data.to(dtype)
    size = (shape[0], shape[1], shape[2], 4 * shape[3], 4 * shape[4])
    parts = torch.randn(size, dtype=dtype).split((16, size[1] - 16), dim=1) if size[1] > 16 else None
    given = torch.randn(size, dtype=dtype), Context(torch.randn(shape[0], 40, tiny_models.TEXT_DIM, dtype=dtype))

    def compute(tracking):
        latent = given[0] if parts is None else torch.cat(parts, dim=1)  # further channels, as a branch joins them
        network(latent, torch.full((shape[0],), 500.0), given[1])
        return given[1]

    weights = [*network.parameters(), *network.buffers(), given[0], given[1].text, *(parts or ())]
    network._rotary_table(given[0])  # made on a CPU in other steps
    real = allocated(compute, [*weights, *network._rotary_table(given[0])])
    dry = run(
        DryNetwork(family("wan"), as_json(network.config), str(dtype).removeprefix("torch."), frozenset(), 1),
        DryVideo((size[0], 16, *size[2:]), 40, False, 1),
        DryRank("cpu", Plan(), 0, "rotate", False),
    )
    tables = sum(part.nbytes for part in network._rotary_table(given[0]))
    said = dry.blocks + dry.context - tables
    print(f"{real.most} bytes taken, {said} by the dry pass")
    assert real.most <= 1.03 * said and said <= 1.03 * real.most
