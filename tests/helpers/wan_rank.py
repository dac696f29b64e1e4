"""A rank that runs a Wan transformer on its chunk of the tokens, for a test: `wan_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds config.json, weights.safetensors and inputs.safetensors
(latent, timestep, text); the rank writes the velocity of the whole latent to RANK.safetensors. The ranks meet in a
file of the folder, at no port.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.sequence import ShardedSequence
from ascend_runtime.parallel.ulysses import Ulysses
from safetensors.torch import load_file, save_file


def main():
    folder, rank, ranks = gloo_ranks.join()
    model = WanTransformer(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"), assign=True)
    operators = PlainOperators()
    group = dist.group.WORLD
    model.arrange(operators, ShardedSequence(group, operators.attention, Ulysses(group), None))
    inputs = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        velocity = model(inputs["latent"], inputs["timestep"], Context(inputs["text"]))
    save_file({"velocity": velocity}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
