"""A rank that counts what it sends in a step, for a test: `counting_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds config.json of a transformer, the latent's shape and plans
(cases.json); the rank writes what each plan's guided steps sent, a list of [operation, bytes] a step, by number, to
sent-RANK.json. The steps have one prompt.
The ranks meet in a file of the folder, at no port.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import cut_dim, replicated
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
    config, cases = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "cases"))
    sent = [steps(config, **case) for case in cases]
    (folder / f"sent-{rank}.json").write_text(json.dumps(sent))
    dist.destroy_process_group()


def steps(config, *, plan, options, latent):
    """What two guided steps send."""
    mesh, operators = mesh_of("cpu", Plan(**plan)), PlainOperators()
    sharding = sharding_of("cpu", dist.get_world_size(), mesh.plan.tp, fsdp=False)
    model = WanTransformer(config, sharding.tp)
    ShardedWeights(sharding, cut_dim, replicated, model.units).prepare(model)
    model.to_empty(device="cpu")
    model.arrange(operators, spread(mesh, operators, **options))
    text = torch.zeros(latent[0], 8, model.config.text_dim)
    latent, timestep = torch.zeros(latent), torch.zeros(latent[0])
    cfg_group = mesh.group("cfg") if mesh.plan.cfg > 1 else None
    contexts, sent = {"cond": Context(text), "uncond": Context(text)}, [Sent(), Sent()]
    for step in sent:
        with step:
            guided(*computed(("cond", "uncond"), lambda name: model(latent, timestep, contexts[name]), cfg_group), 5.0)
    return [step.noted for step in sent]
