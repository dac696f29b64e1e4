"""A rank that counts what it sends in a step, for a test: `counting_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds a folder for each family, with config.json of a transformer, the
latent's shape and plans (cases.json); the rank writes what each plan's guided steps sent, a list of [operation, bytes]
a step, by number, to sent-RANKS-RANK.json in it. The steps have one prompt.
The ranks meet in a file of the folder, at no port.
"""

import json

import ascend_runtime.models.hunyuan_video.networks  # with the next, what each rank would import
import ascend_runtime.models.wan.networks
import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.models.family import TRANSFORMER
from ascend_runtime.models.hunyuan_video import context as hunyuan_video
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan import context as wan
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.cfg import computed, guided
from ascend_runtime.parallel.fsdp import ShardedWeights, sharding_of
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.parallel.sequence import spread
from ascend_runtime.specs import Plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(TorchDispatchMode):
    """Notes every operation of torch.distributed, and how many bytes it takes from this rank to others."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace in ("c10d", "_c10d_functional"):
            name = operator.name().partition("::")[2].partition(".")[0]
            tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
            groups = [dist.get_world_size(g) for g in map(_group, tree_leaves(arguments)) if g is not None]
            self.noted.append([name, _bytes_sent(name, tensors, groups[0] if groups else 0)])
        return operator(*arguments, **(keywords or {}))


def _group(argument):
    try:
        return dist.ProcessGroup.unbox(argument)
    except (TypeError, RuntimeError):
        return None


def _bytes_sent(name, tensors, ranks):
    """By a rank, however the backend does it: the least that the operation asks for."""
    sizes = [tensor.nbytes for tensor in tensors]
    if name == "alltoall_base_":
        return sizes[1] * (ranks - 1) // ranks
    if name == "_allgather_base_":
        return sizes[1] * (ranks - 1)
    if name == "allreduce_":
        return 2 * sizes[0] * (ranks - 1) // ranks
    return {"send": sum(sizes), "recv_": 0}[name]


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    for name in CONTEXTS:
        config, cases = (json.loads((folder / name / f"{part}.json").read_text()) for part in ("config", "cases"))
        sent = [steps(family(name), config, **case) for case in cases[str(ranks)]]
        (folder / name / f"sent-{ranks}-{rank}.json").write_text(json.dumps(sent))
    dist.destroy_process_group()


def _of_hunyuan_video(text, config):
    pooled = torch.zeros(len(text), config.pooled_projection_dim)
    return hunyuan_video.Context(text, pooled, torch.zeros(len(text)))


CONTEXTS = {"wan": lambda text, _: wan.Context(text), "hunyuan_video": _of_hunyuan_video}


def steps(of, config, *, plan, options, latent):
    """What two guided steps of a family's transformer send."""
    mesh, operators = mesh_of("cpu", Plan(**plan)), PlainOperators()
    spreading = {name: value for name, value in options.items() if name != "fsdp"}
    sharding = sharding_of("cpu", dist.get_world_size(), mesh.plan.tp, fsdp=options.get("fsdp", False))
    model = of.network(TRANSFORMER, config, sharding.tp)
    ShardedWeights(sharding, of.weights.cut_dim, of.weights.replicated, model.units).prepare(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.zero_()
    model.arrange(operators, spread(mesh, operators, **spreading))
    text = torch.zeros(latent[0], 8, of.text_width(config))
    latent, timestep = torch.zeros(latent), torch.zeros(latent[0])
    cfg_group = mesh.group("cfg") if mesh.plan.cfg > 1 else None
    contexts = {branch: CONTEXTS[of.name](text, model.config) for branch in ("cond", "uncond")}
    sent = [Sent(), Sent()]
    for step in sent:
        with step:
            guided(*computed(("cond", "uncond"), lambda name: model(latent, timestep, contexts[name]), cfg_group), 5.0)
    return [step.noted for step in sent]
