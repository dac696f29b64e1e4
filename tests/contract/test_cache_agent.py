"""AttentionCache and block cache against MindIE SD's own CacheAgent: the same blocks computed, the same result."""

import random

import pytest
import torch
from ascend_runtime.acceleration.attention_cache import AttentionCache
from ascend_runtime.acceleration.block_cache import BlockCache
from ascend_runtime.models.shared.block_stack import At, BlockStack
from ascend_runtime.acceleration.tally import Tally
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.specs import Window
from mindiesd import CacheAgent, CacheConfig

JOBS = 200


@pytest.fixture(params=range(3))
def draw(request):
    print(f"seed {request.param}")
    return random.Random(request.param)


def jobs(draw):
    """(a window, steps, blocks) of random jobs."""
    for _ in range(JOBS):
        steps, blocks = draw.randint(1, 30), draw.randint(2, 6)
        start, interval = draw.randint(0, steps + 2), draw.randint(1, 6)
        first = draw.randint(0, blocks - 2)
        yield Window(
            start=start, end=draw.randint(start, steps + 3), interval=interval, first_block=first,
            last_block=draw.randint(first + 1, blocks - 1),
        ), steps, blocks  # fmt: skip


def agent_of(method, window, steps, blocks, **blocks_too):
    return CacheAgent(CacheConfig(method=method, blocks_count=blocks, steps_count=steps, step_start=window.start,
                                  step_end=window.end, step_interval=window.interval, **blocks_too))  # fmt: skip


def ours(cache_kind, window, steps, blocks):
    tally = Tally(Work((BlockWork(1.0, 1.0, 1.0),) * blocks, rest=1.0))
    return cache_kind(window, steps, blocks, tally), tally


def test_attention_cache(draw):
    """Its attention cache knows no range of blocks."""
    reused = 0
    for window, steps, blocks in jobs(draw):
        window = Window(start=window.start, end=window.end, interval=window.interval)
        agent = agent_of("attention_cache", window, steps, blocks)
        cache, tally = ours(AttentionCache, window, steps, blocks)
        for step in range(steps):
            tally.began(at := At("high_noise", "cond", step))
            for block in range(blocks):
                new = torch.tensor([step, block])
                out = cache.attention(at, block, lambda: new)
                assert out is agent.apply(lambda: new), (window, steps, blocks, step)
        reused += tally.facts()["attentions_reused"]
    assert reused > JOBS


def test_block_cache(draw):
    """Its block cache ignores its end step, so ours gets the last one; and of a range of one block it keeps what goes
    in, not what is added, so ranges have two or more."""
    skipped = 0
    for window, steps, blocks in jobs(draw):
        window = Window(start=window.start, end=max(steps, window.start), interval=window.interval,
                        first_block=window.first_block, last_block=window.last_block)  # fmt: skip
        agent = agent_of("dit_block_cache", window, steps, blocks, block_start=window.first_block,
                         block_end=window.last_block + 1)  # fmt: skip
        cache, tally = ours(BlockCache, window, steps, blocks)
        for step in range(steps):
            computed, ran = [], []

            def run(block, x, into):
                into.append(block)
                return x + (step + 1) * 10.0**block

            x = torch.tensor([float(step)])
            tally.began(at := At("high_noise", "cond", step))
            out = cache.blocks(at, BlockStack(lambda block, x: run(block, x, ran), blocks, lambda *_: x), x)
            for block in range(blocks):
                x = agent.apply(lambda hidden_states: run(block, hidden_states, computed), hidden_states=x)
            assert ran == computed and torch.equal(out, x), (window, steps, blocks, step)
        skipped += tally.facts()["blocks_skipped"]
    assert skipped > JOBS
