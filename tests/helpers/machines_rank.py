"""A rank that pretends to be on one of two machines, for a test (see tests/ranks/test_pretended_machines.py).

`main()` by gloo_ranks, in FOLDER, which holds a checkpoint ("model"). The rank writes what it found to found-RANK.json.
"""

import importlib
import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime import AccelerationSpec, DiffusionModelSpec, ParallelSpec
from ascend_runtime.components import HostMemory
from ascend_runtime.components.standby import DiffusionModels
from ascend_runtime.engine.guard import frames
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.hardware import devices
from ascend_runtime.parallel import machines
from ascend_runtime.wire import messages
from ascend_runtime.wire.channel import channel_pair
from ascend_runtime.wire.plans import PlannedJob
from generation_rank import SHAPE, message_of
from msgspec.structs import replace

for name in ("models.wan.networks", "models.hunyuan_video.family", "engine.sampling"):
    importlib.import_module(f"ascend_runtime.{name}")  # once, before the ranks are forked

NAMES = ("atlas1", "atlas1", "atlas1", "atlas2")
GB = 10**9
AVAILABLE = {"atlas1": 900 * GB, "atlas2": 700 * GB}
ON_HOST = ((1, 5, 0), (2, 6, 3), (4, 7, 0), (8, 9, 4))  # bytes of each rank


def main():
    torch.set_grad_enabled(False)
    folder, rank, _ = gloo_ranks.join()
    here = machines.machines()
    assert here.names == NAMES and here.name_of(3) == "atlas2" and here.count == 2 and here.hosts == (0, 0, 0, 1)
    assert here.is_first == (rank in (0, 3)) and here.members == ((0, 1, 2), (3,))
    shares_are_added(here, folder)
    videos_stand_still_on_all_machines(here)
    pipeline, (channel, other) = RankPipeline(torch.device("cpu")), channel_pair()
    of_plans = plans(pipeline, channel, folder)
    memory_is_of_each_machine(pipeline, here)
    link = pipeline.link
    found = {"link": [link.rank_byte, link.machine_byte, link.exchange], **of_plans}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    other.close()
    dist.barrier()
    dist.destroy_process_group()


def shares_are_added(here, folder):
    """Of memory that each machine has once; some ranks' shares are empty."""
    for rows in (7, 2):
        own = [torch.randn(rows, 3, generator=torch.Generator().manual_seed(number)) for number in range(2)]
        name = str(folder / f"sums-{rows}-{here.name_of(here.rank)}")
        shared = torch.from_file(name, shared=True, size=rows * 3).view(rows, 3)
        if here.is_first:
            shared.copy_(own[here.here])
        dist.barrier()
        shares = shared.tensor_split(len(NAMES))
        machines.add_machines(shares)
        assert torch.allclose(shares[here.rank], (own[0] + own[1]).tensor_split(len(NAMES))[here.rank])
        dist.barrier()


def videos_stand_still_on_all_machines(here):
    """A machine has zeros where the others have their tiles."""
    still, moving = torch.ones(3, 2, 2, 3), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 2, 3)
    assert frames._stands_still(still)
    assert not frames._stands_still(moving if here.here == 1 else still)


def memory_is_of_each_machine(pipeline, here):
    """Sums within a machine, of which the least counts; alike on all ranks."""
    devices.host_memory = lambda: AVAILABLE[here.name_of(here.rank)]
    DiffusionModels.on_host = ON_HOST[here.rank]
    found = pipeline._host_memory()
    assert found == HostMemory(700 * GB, 7, 9, 3, ranks=3)
    made = pipeline._machine()
    assert (made.ranks, made.host_ranks, made.hosts, made.link) == (4, 3, (0, 0, 0, 1), pipeline.link)
    assert made.host_memory == 700 * GB + 7 + 9 + 3 and made.device_memory == 300 * GB  # of atlas1's three ranks


def plans(pipeline, channel, folder):
    """The plan of a job without guidance, its latent, and what is said of one whose Ulysses crosses machines."""
    plan, model = {"cfg_degree": 2, "ulysses_degree": 2}, DiffusionModelSpec(path=str(folder / "model"))
    job = {"guidance_scale": 1.0, "solver": "euler", "known": False}
    made = {}
    for name, degrees in {"joined": plan, "whole": {"cfg_degree": 1, "ulysses_degree": 4}}.items():
        message = replace(message_of(job | {"plan": degrees}, folder), acceleration=AccelerationSpec())
        done = pipeline.sample(Job(message, channel, pipeline.device))
        made[name] = {axis: done.info[f"{axis}_degree"] for axis in ("cfg", "ring", "ulysses")}, done.tensor
    if dist.get_rank() == 0:
        assert (made["joined"][1] - made["whole"][1]).abs().max() < 1e-4 and made["whole"][1].std() > 0.1
    planned = PlannedJob(model=model, parallel=ParallelSpec(ulysses_degree=4), shape=SHAPE)
    asked = messages.Choose(job=1, planned=planned)
    chosen = pipeline.choose(Job(asked, channel, pipeline.device)).info.get("plan", {})
    return {"joined": made["joined"][0], "whole": made["whole"][0], "warning": chosen.get("warning"),
            "line": chosen.get("line")}  # fmt: skip
