"""One of the two ranks of `scaling`: times a block in each mode, and independently of the other rank. Prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanBlock
from ascend_runtime.ops import PlainOperators
from ascend_runtime.ops.plain import RotaryTable
from ascend_runtime.parallel.cfg import computed, guided
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.parallel.sequence import SequenceLayout, WholeSequence, spread
from ascend_runtime.specs import Plan

DIM, FFN, HEADS, TEXT = 1536, 8960, 12, 512  # Wan 2.1 1.3B
TOKENS, ROUNDS = 4096, 5
QUICK_TOKENS, QUICK_ROUNDS = 256, 2
SHARED = {
    "ulysses": (Plan(ulysses=2), {}),
    "ulysses_overlap": (Plan(ulysses=2), {"overlap": True}),
    "ring": (Plan(ring=2), {}),
    "ring_gather": (Plan(ring=2), {"ring_exchange": "gather"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", init_method=f"file://{arguments.folder}/rendezvous", rank=arguments.rank,
                            world_size=2)  # fmt: skip
    tokens, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if arguments.quick else (TOKENS, ROUNDS)
    measured = _measure(_Block(tokens), rounds)
    if arguments.rank == 0:
        print(json.dumps({"tokens": tokens, **measured}))
    dist.barrier()


class _Block:
    """A block with random weights, and a video's tokens for it."""

    def __init__(self, tokens: int):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.operators = PlainOperators()
        self.block = WanBlock(DIM, FFN, HEADS).eval()
        self.x, self.timestep = draw(1, tokens, DIM), draw(1, 6, DIM)
        text = draw(1, TEXT, DIM)
        self.context = Context(text)
        self.context.embedded = text, None
        angles = draw(1, tokens, 1, DIM // HEADS // 2).repeat_interleave(2, -1)
        self.rotary = self.operators.rotary_table(angles.cos(), angles.sin())

    def on(self, sequence: SequenceLayout) -> Callable[[], Tensor]:
        """Runs the block on this rank's tokens of `sequence`. The prompt is the same in every run, and the tokens are
        already split, as in all blocks of a step but the first."""
        rotary = tuple(sequence.split(part).contiguous() for part in self.rotary)
        x = sequence.split(self.x).contiguous()
        return lambda: self._run(sequence, x, rotary)

    def _run(self, sequence: SequenceLayout, x: Tensor, rotary: RotaryTable) -> Tensor:
        for module in (self.block, self.block.attn1, self.block.attn2):
            module.ops = self.operators
        self.block.attn1.sequence = sequence
        return self.block(x, self.context, self.timestep, rotary)


def _measure(block: _Block, rounds: int) -> dict:
    """The seconds of each round by mode: an independent run, then a parallel one."""
    whole = block.on(WholeSequence(block.operators.attention))
    modes: dict[str, Callable[[], object]] = {}
    for name, (plan, options) in SHARED.items():
        modes[name] = block.on(spread(mesh_of("cpu", plan), block.operators, **options))
    group = mesh_of("cpu", Plan(cfg=2)).group("cfg")
    modes["cfg"] = lambda: guided(*computed(("cond", "uncond"), lambda branch: whole(), group), 5.0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in modes}
    for turn in range(rounds + 1):
        for name, mode in modes.items():
            # Guidance has two branches; an independent round computes one.
            pair = _seconds(whole), _seconds(mode) / (2 if name == "cfg" else 1)
            if turn:  # the first is a warm-up
                seconds[name].append(pair)
    return {"seconds": seconds}


def _seconds(mode: Callable[[], object]) -> float:
    """The seconds of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    mode()
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


if __name__ == "__main__":
    main()
