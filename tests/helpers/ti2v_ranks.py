"""Groups of ranks that continue a first frame, with a timestep a token, for a test: `ti2v_ranks.py FOLDER`.

FOLDER holds the transformer of a checkpoint and cases.json: by number of ranks a list of arguments of `on_ranks`. Rank
0 writes the latents of so many ranks to RANKS.safetensors, by number. The ranks of a group meet in a file of the
folder, at no port. They are forked, for what takes long is to import.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.checkpoints.reader import check_weights, load_weights
from ascend_runtime.models.wan import transformer as wan
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.weights import cut_dim, replicated
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.cfg import computed, guided
from ascend_runtime.parallel.fsdp import ShardedWeights, Sharding, sharding_of
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.parallel.sequence import spread
from ascend_runtime.specs import Plan
from ascend_runtime.engine.sampling import denoise, noisy
from ascend_runtime.specs import SampleSpec
from ascend_runtime.hardware.processes import die_with
from safetensors.torch import save_file


def load(folder: Path, sharding: Sharding = Sharding()) -> wan.WanTransformer:
    """What this rank holds of the network."""
    found = find_transformer(str(folder))
    network = wan.WanTransformer(found.config, sharding.tp).eval()
    share = ShardedWeights(sharding, cut_dim, replicated, network.units)
    cpu = torch.device("cpu")
    places = check_weights(network, found.shards)
    load_weights(network, places, dtype_of=lambda name: torch.float32, device=cpu, share=share)
    return network


@torch.no_grad()
def continued(network, cfg_group, shape, guidance_scale, steps) -> torch.Tensor:
    """The latent [B,C,T,H,W] whose first frame is given: its tokens are clean, and so have timestep 0.

    As in diffusers' WanImageToVideoPipeline with `expand_timesteps`.
    """
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(*shape[:2], 1, *shape[3:], generator=generator)
    text = {name: torch.randn(1, 20, network.config.text_dim, generator=generator).expand(shape[0], -1, -1)
            for name in ("cond", "uncond")}  # fmt: skip
    contexts = {name: Context(prompt) for name, prompt in text.items()}
    unknown = torch.ones(shape[2:])
    unknown[0] = 0

    def predict(latent, timestep, step):
        latent = torch.where(unknown.bool(), latent, first)
        timesteps = (timestep * unknown[:, ::2, ::2]).flatten().expand(shape[0], -1)
        names = ("cond",) if guidance_scale == 1 else ("cond", "uncond")
        velocities = computed(names, lambda name: network(latent, timesteps, contexts[name]), cfg_group)
        return velocities[0] if guidance_scale == 1 else guided(*velocities, guidance_scale)

    spec = SampleSpec(seed=11, steps=steps, guidance_scale=guidance_scale, shift=5.0)
    latent = denoise(predict, tiny_models.scheduler(spec), noisy(torch.zeros(shape), spec))
    return torch.where(unknown.bool(), latent, first)


def on_ranks(networks, *, plan, fsdp, ring_exchange, overlap, guidance_scale, shape, steps) -> torch.Tensor:
    """`continued` on all ranks of the group, by a plan."""
    sharding = sharding_of("cpu", dist.get_world_size(), plan["tp"], fsdp)
    plan = Plan(**plan) if guidance_scale != 1 else Plan(**plan).unguided()
    mesh, operators = mesh_of("cpu", plan), PlainOperators()
    network = networks(sharding)
    network.arrange(operators, spread(mesh, operators, ring_exchange, overlap))
    return continued(network, mesh.group("cfg") if plan.cfg > 1 else None, shape, guidance_scale, steps)


def work(folder: Path, rank: int, ranks: int, cases: list[dict]) -> None:
    die_with(int(os.environ["ASCEND_RUNTIME_PARENT"]))
    meeting = f"file://{folder}/rendezvous-{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    held = {}

    def networks(sharding):
        if sharding not in held:
            held[sharding] = load(folder, sharding)
        return held[sharding]

    latents = {str(number): on_ranks(networks, **case) for number, case in enumerate(cases)}
    if rank == 0:
        save_file(latents, folder / f"{ranks}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def main():
    folder = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["ASCEND_RUNTIME_PARENT"] = str(os.getpid())
    context = multiprocessing.get_context("fork")
    for ranks, cases in json.loads((folder / "cases.json").read_text()).items():
        group = [context.Process(target=work, args=(folder, rank, int(ranks), cases)) for rank in range(int(ranks))]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert [process.exitcode for process in group] == [0] * int(ranks)


if __name__ == "__main__":
    main()
