"""The FLOPs that reports count with are those of a forward pass, as torch counts them; its memory is what it takes."""

import pytest
import random_hunyuan
import tiny_models
import torch
from ascend_runtime.models.hunyuan_video import cost as hunyuan_cost
from ascend_runtime.models.hunyuan_video.context import Context as HunyuanContext
from ascend_runtime.models.hunyuan_video.transformer import HunyuanVideoTransformer
from ascend_runtime.models.shared.block_stack import Pass
from ascend_runtime.models.cost import PassSize
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanBlock, WanTransformer
from ascend_runtime.models.wan.cost import taken_by, work_of
from ascend_runtime.ops.memory import most_allocated
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.sequence import ShardedSequence, WholeSequence
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


class Part(ShardedSequence):
    """The sequence as one of many ranks holds it, on the meta device: with an attention and a gather that take no more
    than their results."""

    def __init__(self, degree, rank):
        self.degree, self.rank = degree, rank

    def attention(self, query, key, value, attend=None):
        return torch.empty_like(query)

    def gather(self, x, length):
        return x.new_empty(x.shape[0], length, x.shape[2])


@pytest.mark.parametrize("degree, rank", [(1, 0), (8, 0), (8, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", random_hunyuan.KINDS)
def test_a_pass_of_hunyuan_video_takes_what_taken_by_says(kind, dtype, degree, rank):
    """Blocks of the published size, for 1280 x 720 x 129."""
    config = {"num_layers": 1, "num_single_layers": 1, **random_hunyuan.KINDS[kind]}
    network, text = HunyuanVideoTransformer(config).to(dtype), 256
    network.arrange(network.ops, Part(degree, rank))
    with torch.device("meta"):
        latent = torch.empty(1, network.config.in_channels, 33, 90, 160, dtype=dtype)
        context = HunyuanContext(torch.empty(1, text, 4096, dtype=dtype), torch.empty(1, 768, dtype=dtype),
                                 torch.empty(1) if network.config.guidance_embeds else None)  # fmt: skip
        timestep = torch.empty(1)
    tokens, rotary = 33 * 45 * 80, network._rotary_table(latent, text)  # cached before, as the CPU computes it
    given = [*network.parameters(), latent, *rotary]

    def compute():
        for tensor in given:
            tensor.view_as(tensor)  # views count as their whole tensors: here, to subtract them
        network(latent, timestep, context)

    takes = most_allocated(compute) - sum(tensor.nbytes for tensor in given) + sum(part.nbytes for part in rotary)
    said = hunyuan_cost.taken_by(config, PassSize(1, tokens, -(-(tokens + text) // degree), text), dtype.itemsize)
    print(f"{takes / 1e9:.3f} GB taken, {said / 1e9:.3f} GB by formula")
    assert 0.85 * said < takes <= said
