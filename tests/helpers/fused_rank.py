"""A rank that reads its part of fused files, for a test: `fused_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds cases.json, the files that it names, and x.safetensors. The rank
writes what it holds of each case's parameters to held-RANK.safetensors, by case and name, and to said-RANK.json the
bytes that it read and that progress reported. The ranks meet in a file of the folder, at no port.
"""

import json
import os
from dataclasses import replace
from threading import Lock

import fused_files
import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.models.shared.quantized.replacing import (
    QUANTIZATION_SCHEMES,
    linears,
    quantize,
    quantized_parameters,
)
from ascend_runtime.models.wan.files import lora_names
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.checkpoints.reader import check_weights, load_weights
from ascend_runtime.components.loras.adapter import Adapter
from ascend_runtime.components.loras.requests import LoraTarget
from ascend_runtime.parallel.fsdp import ShardedWeights, own_part, sharding_of
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
NAMES = replace(
    lora_names.LORA_NAMES,
    fused=lambda shapes: [f"blocks.{block}.{layer}.{leaf}" for block in range(2) for layer in fused_files.FUSED_LAYERS
                          for leaf in ("weight", "bias")],
    split=fused_files.split,
)  # fmt: skip
read, lock = [0], Lock()


def counting_preadv(*arguments, preadv=os.preadv):
    count = preadv(*arguments)
    with lock:
        read[0] += count
    return count


def load(file, dtype, quantized, share_of):
    """(the network, where its parameters lie, its share, the bytes that progress reported)"""
    network, done = fused_files.Network().eval(), []
    places = check_weights(network, (file,), fused_files.rename, split=fused_files.split)
    layers = linears(network, lambda name: name.startswith("blocks.")) if quantized else []
    quantize(network, {name: QUANTIZATION_SCHEMES["w8a8_dynamic"] for name in layers}, "blocks.")
    share, in_8_bits = share_of(network), quantized_parameters(network)
    load_weights(
        network,
        places,
        dtype_of=lambda name: in_8_bits.get(name, dtype),
        device=CPU,
        share=share,
        on_bytes=done.append,
        scales_of={f"{name}.weight": f"{name}.weight_scale" for name in layers},
    )
    return network, places, share, sum(done)


def run(folder, inputs, *, file, dtype, quantized, tp, fsdp, lora):
    sharding = sharding_of("cpu", dist.get_world_size(), tp, fsdp)

    def share_of(network):
        return ShardedWeights(sharding, fused_files.cut_dim, lambda name: False, [*network.blocks])

    read[0] = 0
    network, places, share, reported = load(folder / file, getattr(torch, dtype), quantized, share_of)
    said = {"read": read[0], "reported": reported}
    if lora:
        shapes = {name: place.shape for name, place in places.items()}
        adapter = Adapter(LoraTarget(places, NAMES), network.get_parameter, share, CPU)
        adapter.use([(read_lora(folder / lora, shapes, NAMES), 0.5)], lambda nbytes: None)
    held = {name: own_part(p).detach().clone() for name, p in network.named_parameters()}
    if fsdp and tp == 1 and not quantized:
        held["made"] = network(inputs.to(getattr(torch, dtype)))
    return held, said


def main():
    torch.set_grad_enabled(False)
    folder, rank, _ = gloo_ranks.join()
    os.preadv = counting_preadv
    inputs, held, said = load_file(folder / "x.safetensors")["x"], {}, {}
    for case, how in json.loads((folder / "cases.json").read_text()).items():
        made, said[case] = run(folder, inputs, **how)
        held |= {f"{case}, {name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(held, folder / f"held-{rank}.safetensors")
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()
