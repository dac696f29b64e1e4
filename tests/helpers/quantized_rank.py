"""A rank that holds its part of a quantized transformer, for a test: `quantized_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds cases.json, each with a model's path, how to load it and the
plan; and inputs.safetensors. The rank writes each case's velocity to out-RANK.safetensors, and to told-RANK.json the
bytes that it keeps of quantized weights, and what it sends in a forward: [operation, bytes]. What it keeps of LAYER,
and where slices are all that is cut, what LAYER makes of random rows, goes to kept-RANK.safetensors, by case and name.
"""

import json

import gloo_ranks
import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec, LoraSpec
from ascend_runtime.components import Components
from ascend_runtime.models.shared.quantized.static import use_step
from ascend_runtime.parallel.fsdp import own_part, sharding_of
from counting_rank import Sent
from safetensors.torch import load_file, save_file


BYTES = (torch.int8, torch.uint8)
LAYER = "blocks.0.attn1.to_out.0"  # which slices cut along what goes in


def rows(width):
    """Random inputs of a layer."""
    return torch.randn(2, 20, width, generator=torch.Generator().manual_seed(23))


def loras(case):
    return (LoraSpec(path=case["lora"], strength=0.3),) if case["lora"] else ()


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    inputs, outs, told, kept = load_file(folder / "inputs.safetensors"), {}, {}, {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        spec = DiffusionModelSpec(
            path=case["path"], dtype="float32", quantization=case["quantization"], loras=loras(case)
        )
        sharding = sharding_of("cpu", ranks, case["tp"], case["fsdp"])
        network = Components(torch.device("cpu")).get(spec, lambda *_: None, sharding).high_noise
        use_step(network, case.get("step"))
        with Sent() as sent:
            outs[name] = tiny_models.velocity(network, **inputs).contiguous()
        integers = [own_part(p) for p in network.parameters() if p.dtype in BYTES]
        told[name] = {"kept": sum(x.nbytes for x in integers), "sent": sent.noted}
        kept |= {f"{name}, {leaf}": own_part(p).contiguous()
                 for leaf, p in network.get_submodule(LAYER).named_parameters()}  # fmt: skip
        if sharding.mesh is None:
            layer = network.get_submodule(LAYER)
            own = rows(layer.in_features).chunk(sharding.tp.degree, -1)[sharding.tp.rank]
            kept[f"{name}, rows"] = layer.all_reduced(own, sharding.tp)
    save_file(kept, folder / f"kept-{rank}.safetensors")
    save_file(outs, folder / f"out-{rank}.safetensors")
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
