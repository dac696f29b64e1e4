"""A rank that attends to its chunks of sequences, for a test: `sequence_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds cases.json, and query, key and value of each case in
NUMBER.safetensors; the rank writes the attention of the whole sequences to out-RANK.safetensors, by number.
"""

import json

import gloo_ranks
import torch.distributed as dist
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.ring import Ring
from ascend_runtime.parallel.sequence import ShardedSequence
from ascend_runtime.parallel.ulysses import Ulysses
from safetensors.torch import load_file, save_file

NAMES = ("ring", "ulysses", "exchange", "overlap", "tokens", "heads")
from torch.distributed.device_mesh import init_device_mesh


def main():
    folder, rank, ranks = gloo_ranks.join()
    cases = json.loads((folder / "cases.json").read_text())
    outs = {str(number): attend(load_file(folder / f"{number}.safetensors"), **case)
            for number, case in enumerate(cases)}  # fmt: skip
    save_file(outs, folder / f"out-{rank}.safetensors")
    dist.destroy_process_group()


def attend(inputs, *, ring, ulysses, exchange, overlap, **_):
    """The attention of the whole sequence [B, S, heads * head_dim]."""
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    operators = PlainOperators()
    sequence = ShardedSequence(
        dist.group.WORLD,
        operators.attention,
        Ulysses(mesh["ulysses"].get_group(), overlap) if ulysses > 1 else None,
        Ring(mesh["ring"].get_group(), operators, exchange) if ring > 1 else None,
    )
    query, key, value = (sequence.split(inputs[name]) for name in ("query", "key", "value"))
    return sequence.gather(sequence.attention(query, key, value).flatten(2), inputs["query"].shape[1]).contiguous()
