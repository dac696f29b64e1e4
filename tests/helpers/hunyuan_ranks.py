"""Groups of ranks that run small HunyuanVideo models, for a test: `hunyuan_ranks.py FOLDER`.

FOLDER holds a model's folder of each of MODELS, and cases.json: by number of ranks a list of arguments of `on_ranks`.
Rank 0 writes the latents of so many ranks to RANKS.safetensors, by number, and the sizes of the indicators; of 2 ranks
also what `joined` makes of each of FORMATS. The ranks of a group meet in a file of the folder, at no port.
"""

import json
from pathlib import Path

import gloo_ranks
import random_hunyuan
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.checkpoints.msmodelslim import TIMESTEP, Layer
from ascend_runtime.checkpoints.reader import assign
from ascend_runtime.components import Components
from ascend_runtime.models.hunyuan_video.context import Context
from ascend_runtime.models.shared.block_stack import Pass
from ascend_runtime.models.hunyuan_video.weights import cut_dim
from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.models.shared.quantized.replacing import KINDS
from ascend_runtime.ops.blocks.ggml import BLOCK_TYPES
from ascend_runtime.models.shared.quantized.static import use_step
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.cfg import computed, guided
from ascend_runtime.parallel.fsdp import Sharding, sharding_of
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.parallel.sequence import spread
from ascend_runtime.parallel.tensor import WholeWeights
from ascend_runtime.specs import Plan
from safetensors.torch import save_file
from torch import nn

MODELS = {  # by name: the kind and its changes. 12 heads: which Ulysses 8 does not divide, nor Ulysses 2 what tensor 4
    # leaves of them
    "t2v": ("t2v", {"num_attention_heads": 24, "attention_head_dim": 8, "rope_axes_dim": (2, 2, 4)}),
    "i2v concat": ("i2v concat", {"num_attention_heads": 12}),
    "i2v replace": ("i2v replace", {"num_attention_heads": 12}),
}
STEPS = (900.0, 400.0)  # timesteps
NEGATIVE = 3  # tokens of the negative prompt


class Looking(Pass):
    """A pass that also asks for the indicator of step caches, in its first forward. size: the sum of its magnitudes
    over the ranks of `group`, which share the tokens."""

    def __init__(self, group):
        self._group, self.size = group, None

    def blocks(self, stack, tokens):
        if self.size is None:
            self.size = stack.indicator(tokens, 0).abs().sum()
            if self._group is not None:
                dist.all_reduce(self.size, group=self._group)
        return super().blocks(stack, tokens)


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
def denoised(network, cfg_group=None, looking=Looking(None), *, shape, text, guidance_scale) -> torch.Tensor:
    """The latent [B, C, T, H, W] of `shape` after STEPS. text: the number of tokens of the prompt."""
    batch, _, *size = shape
    given = random_hunyuan.inputs(network.config, size, text, batch)
    negative = random_hunyuan.inputs(network.config, size, NEGATIVE, batch, seed=2)
    contexts = {"cond": given, "uncond": negative} if guidance_scale != 1 else {"cond": given}
    contexts = {name: Context(one.text, one.pooled, one.guidance) for name, one in contexts.items()}
    latent, rest = given.latent.split([shape[1], network.config["in_channels"] - shape[1]], 1)
    for timestep in STEPS:
        x, times = torch.cat([latent, rest], 1), torch.full((batch,), timestep)
        made = computed(list(contexts), lambda name: network(x, times, contexts[name], looking), cfg_group)
        latent = latent - 0.5 * (made[0] if len(made) == 1 else guided(*made, guidance_scale))
    return latent


def on_ranks(networks, *, model, quantization, plan, fsdp, ring_exchange, overlap, guidance_scale, shape, text):
    """(`denoised` on all ranks of the group, by a plan; the size of the indicator)"""
    sharding = sharding_of("cpu", dist.get_world_size(), plan["tp"], fsdp)
    plan = Plan(**plan) if guidance_scale != 1 else Plan(**plan).unguided()
    mesh, operators, network = mesh_of("cpu", plan), PlainOperators(), networks(model, sharding, quantization)
    network.arrange(operators, spread(mesh, operators, ring_exchange, overlap))
    group, looking = mesh.group("cfg") if plan.cfg > 1 else None, Looking(mesh.group("sequence"))
    return denoised(network, group, looking, shape=shape, text=text, guidance_scale=guidance_scale), looking.size


ATTENTION, FEED_FORWARD = (f"single_transformer_blocks.0.proj_out_{part}" for part in ("attn", "mlp"))
# The step with static scales. Blocks of GGUF files are cut in whole blocks, which these layers are too narrow for.
FORMATS = {"float": None, **{name: None for name in KINDS if name not in BLOCK_TYPES}, f"{TIMESTEP}, static": 1}


def proj_out(form: str) -> dict[str, nn.Module]:
    """The two layers of a single block's proj_out in one of FORMATS, of random parameters."""
    generator, made = torch.Generator().manual_seed(4), {}
    for name, width in ((FEED_FORWARD, 256), (ATTENTION, 64)):
        made[name] = nn.Linear(width, 48, bias=name == FEED_FORWARD)
        if form != "float":
            algorithm = form.partition(",")[0]
            made[name] = KINDS[algorithm](made[name], Layer(algorithm, smoothed=True, steps=2))
            made[name].ops = PlainOperators()
        if FORMATS[form] is not None:
            use_step(made[name], FORMATS[form])
        for leaf, parameter in list(made[name].named_parameters()):
            assign(made[name], leaf, _random(leaf, parameter, generator))
    return made


def _random(leaf: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if leaf == "weight" and like.dtype == torch.uint8:
        return noise.to(torch.float8_e4m3fn).view(torch.uint8)
    if not like.is_floating_point():  # exponents are about 0 at 127
        return (20 * noise + (127 if like.dtype == torch.uint8 else 0)).clamp(-100, 130).to(like.dtype)
    if leaf in ("mul_scale", "input_scale"):
        return 0.05 + 0.05 * noise.abs()
    return (0.01 if "scale" in leaf else 1.0) * noise


def joined(form: str, tp=WholeWeights()) -> torch.Tensor:
    """What a rank's slices of both layers make of random inputs together."""
    layers, pairs = proj_out(form), []
    generator = torch.Generator().manual_seed(5)
    for name, layer in layers.items():
        x = torch.randn(2, 5, layer.in_features, generator=generator)
        for leaf, parameter in list(layer.named_parameters()):
            dim = cut_dim(f"{name}.{leaf}")
            if dim is not None and parameter.shape[dim] > 1:
                assign(layer, leaf, parameter.chunk(tp.degree, dim)[tp.rank].contiguous())
        pairs.append((layer, x.chunk(tp.degree, -1)[tp.rank]))
    return tp.row_linears(PlainOperators(), *pairs)


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    held = {}

    def networks(*key):
        if key not in held:
            held.clear()
            held[key] = load(folder, *key)
        return held[key]

    made = {}
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())[str(ranks)]):
        made[f"{number}"], made[f"{number} looked"] = on_ranks(networks, **case)
    if ranks == 2:
        tp = sharding_of("cpu", ranks, ranks, False).tp
        made |= {form: joined(form, tp) for form in FORMATS}
    if rank == 0:
        save_file(made, folder / f"{ranks}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def quantized_layers(network) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)]
