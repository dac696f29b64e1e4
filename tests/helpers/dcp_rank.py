"""A rank of a group that saves a distributed checkpoint of sharded tensors, for a test: `dcp_rank.py FOLDER`.

FOLDER holds weights.safetensors. The group saves its tensors, rows spread over the ranks, under "model" into
FOLDER/checkpoint. The ranks meet in a file of the folder, at no port.
"""


import gloo_ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main():
    folder, rank, ranks = gloo_ranks.join()
    mesh = init_device_mesh("cpu", (ranks,))
    tensors = load_file(folder / "weights.safetensors")
    spread = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
    dcp.save({"model": spread, "optimizer": {"step": torch.ones(())}}, checkpoint_id=folder / "checkpoint")
    dist.barrier()
    dist.destroy_process_group()
