"""A rank that holds its part of a Wan transformer's weights, for a test: `weights_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds cases.json; the rank writes what each case made of the inputs
to out-RANK.safetensors, and what it cost, in bytes, to told-RANK.json, both by the case's name. The ranks meet in a
file of the folder, at no port.
"""

import gc
import json
import os
from threading import Lock

import tiny_models
import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.checkpoints import reader
from ascend_runtime.checkpoints.formats import safetensors_file
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.models.wan import transformer as wan
from ascend_runtime.models.wan.weights import cut_dim, keeps_fp32, replicated
from ascend_runtime.parallel.fsdp import ShardedWeights, sharding_of
from counting_rank import Sent
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

torch.set_grad_enabled(False)
COUNTING = Lock()


class CountingFile:
    """A safetensors file that counts the bytes that it maps; those that are read are counted by `counting_preadv`."""

    given = 0

    def __init__(self, *arguments, **keywords):
        self._file = safe_open(*arguments, **keywords)

    def __enter__(self):
        self._shard = self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._shard, name)

    def get_tensor(self, key):
        tensor = self._shard.get_tensor(key)
        CountingFile.given += tensor.nbytes
        return tensor


def counting_preadv(*arguments, preadv=os.preadv):
    count = preadv(*arguments)
    with COUNTING:  # several threads read
        CountingFile.given += count
    return count


def alive():
    """Bytes of all tensors' memory that any object of this process still refers to."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x.device.type == "cpu"}
    return sum(storages.values())


def run(folder, *, checkpoint, inputs, tp, fsdp, dtype):
    """What the network makes of the inputs, and bytes: read, kept, held at most and sent in a forward, left when it
    is gone."""
    inputs = load_file(folder / inputs)
    inputs = {name: x if name == "timestep" else x.to(getattr(torch, dtype)) for name, x in inputs.items()}
    gc.collect()
    before, CountingFile.given = alive(), 0
    found = find_transformer(checkpoint)
    sharding = sharding_of("cpu", dist.get_world_size(), tp, fsdp)
    network = wan.WanTransformer(found.config, sharding.tp).eval()
    buffers = alive() - before  # rotary tables, which no rank shares
    reader.load_weights(
        network,
        reader.check_weights(network, found.shards),
        dtype_of=lambda name: torch.float32 if keeps_fp32(name) else getattr(torch, dtype),
        device=torch.device("cpu"),
        share=ShardedWeights(sharding, cut_dim, replicated, network.units),
    )
    told = {"read": CountingFile.given, "kept": alive() - before - buffers}
    held, begun, sent = [], [], Sent()
    for block in network.blocks:  # after FSDP's own hooks
        block.register_forward_pre_hook(lambda *_: held.append(alive() - before - buffers))
        block.register_forward_pre_hook(lambda *_: begun.append([name for name, _ in sent.noted].count("send")))
    with sent:
        velocity = tiny_models.velocity(network, **inputs)
    told |= {"held": max(held), "sent": sent.noted, "begun": begun[: len(network.blocks)]}
    _fail_in_the_second_block(network, inputs)
    again = tiny_models.velocity(network, **inputs)
    assert torch.equal(again, velocity), "another forward, after one that failed, makes something else"
    told["notes"] = _notes(network) if fsdp else 0
    told["dtypes"] = {name: str(p.dtype) for name, p in network.named_parameters()}
    del network, again, block
    gc.collect()
    told["left"] = alive() - before - velocity.nbytes
    return velocity, told


def _fail_in_the_second_block(network, inputs):
    """On all ranks alike, as where memory is short."""

    def fail(*_):
        raise MemoryError

    handle = network.blocks[1].attn2.register_forward_pre_hook(fail)
    try:
        tiny_models.velocity(network, **inputs)
    except MemoryError:
        return
    finally:
        handle.remove()
    raise AssertionError("it did not fail")


def _notes(network):
    """What FSDP2 remembers of past forwards."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in (network, *network.units)]
    return sum(len(group._post_forward_indices) + len(group.comm_ctx.post_forward_order) for group in groups)


def main():
    folder, rank, ranks = gloo_ranks.join()
    safetensors_file.safe_open, os.preadv = CountingFile, counting_preadv
    gc.freeze()  # what the imports made is not looked through again
    done = {name: run(folder, **case) for name, case in json.loads((folder / "cases.json").read_text()).items()}
    save_file({name: velocity.contiguous() for name, (velocity, _) in done.items()}, folder / f"out-{rank}.safetensors")
    (folder / f"told-{rank}.json").write_text(json.dumps({name: told for name, (_, told) in done.items()}))
    dist.barrier()
    dist.destroy_process_group()
