"""Groups of ranks that run small HunyuanVideo models, for a test: `hunyuan_ranks.py FOLDER`.

FOLDER holds a model's folder of each of MODELS, and cases.json: by number of ranks a list of arguments of `on_ranks`.
Rank 0 writes the latents of so many ranks to RANKS.safetensors, by number. The ranks of a group meet in a file of the
folder, at no port.
"""

import json
from pathlib import Path

import gloo_ranks
import random_hunyuan
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.components import Components
from ascend_runtime.models.hunyuan_video.context import Context
from ascend_runtime.models.shared.quantized import QuantizedLinear
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.cfg import computed, guided
from ascend_runtime.parallel.fsdp import Sharding, sharding_of
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.parallel.sequence import spread
from ascend_runtime.specs import Plan
from safetensors.torch import save_file

MODELS = {  # by name: the kind and its changes. 12 heads: which Ulysses 8 does not divide, nor Ulysses 2 what tensor 4
    # leaves of them
    "t2v": ("t2v", {"num_attention_heads": 24, "attention_head_dim": 8, "rope_axes_dim": (2, 2, 4)}),
    "i2v concat": ("i2v concat", {"num_attention_heads": 12}),
    "i2v replace": ("i2v replace", {"num_attention_heads": 12}),
}
STEPS = (900.0, 400.0)  # timesteps
NEGATIVE = 3  # tokens of the negative prompt


def heads(model: str) -> int:
    return MODELS[model][1]["num_attention_heads"]


def write(folder: Path) -> None:
    """A folder of each model."""
    for name, (kind, changes) in MODELS.items():
        random_hunyuan.folder(folder / name, kind, seed=6, **changes)


def load(folder: Path, model: str, sharding: Sharding = Sharding(), quantization: str = "none"):
    """What this rank holds of a network, as a job loads it."""
    spec = DiffusionModelSpec(path=str(folder / model), dtype="float32", quantization=quantization)
    return Components(torch.device("cpu")).get(spec, lambda *_: None, sharding).high_noise


@torch.no_grad()
def denoised(network, cfg_group, *, shape, text, guidance_scale) -> torch.Tensor:
    """The latent [B, C, T, H, W] of `shape` after STEPS. text: the number of tokens of the prompt."""
    batch, _, *size = shape
    given = random_hunyuan.inputs(network.config, size, text, batch)
    negative = random_hunyuan.inputs(network.config, size, NEGATIVE, batch, seed=2)
    contexts = {"cond": given, "uncond": negative} if guidance_scale != 1 else {"cond": given}
    contexts = {name: Context(one.text, one.pooled, one.guidance) for name, one in contexts.items()}
    latent, rest = given.latent.split([shape[1], network.config["in_channels"] - shape[1]], 1)
    for timestep in STEPS:
        x, times = torch.cat([latent, rest], 1), torch.full((batch,), timestep)
        made = computed(list(contexts), lambda name: network(x, times, contexts[name]), cfg_group)
        latent = latent - 0.5 * (made[0] if len(made) == 1 else guided(*made, guidance_scale))
    return latent


def on_ranks(networks, *, model, quantization, plan, fsdp, ring_exchange, overlap, guidance_scale, shape, text):
    """`denoised` on all ranks of the group, by a plan."""
    sharding = sharding_of("cpu", dist.get_world_size(), plan["tp"], fsdp)
    plan = Plan(**plan) if guidance_scale != 1 else Plan(**plan).unguided()
    mesh, operators, network = mesh_of("cpu", plan), PlainOperators(), networks(model, sharding, quantization)
    network.arrange(operators, spread(mesh, operators, ring_exchange, overlap))
    group = mesh.group("cfg") if plan.cfg > 1 else None
    return denoised(network, group, shape=shape, text=text, guidance_scale=guidance_scale)


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    held = {}

    def networks(*key):
        if key not in held:
            held.clear()
            held[key] = load(folder, *key)
        return held[key]

    latents = {
        str(number): on_ranks(networks, **case)
        for number, case in enumerate(json.loads((folder / "cases.json").read_text())[str(ranks)])
    }
    if rank == 0:
        save_file(latents, folder / f"{ranks}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def quantized_layers(network) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)]
