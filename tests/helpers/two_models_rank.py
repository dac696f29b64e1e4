"""A rank that loads two models by turns, on a host whose memory is pretended (see tests/ranks/test_two_models.py).

The models, `model-0` and `model-1` of FOLDER, are in float32. What is kept in bfloat16 is not mapped from the files.
"""

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec, ParallelSpec
from ascend_runtime.components.standby import DiffusionModels
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.hardware import devices, memory
from ascend_runtime.wire import messages


class Client:
    """A channel to a client that says nothing, and hears everything."""

    def take(self):
        return None

    def send(self, message):
        pass


def main():
    folder, rank, ranks = gloo_ranks.join()
    pipeline = RankPipeline(torch.device("cpu"))
    specs = [DiffusionModelSpec(path=str(folder / f"model-{number}"), dtype="bfloat16") for number in range(2)]
    devices.local_ranks = lambda: ranks

    def load(number, free):
        devices.host_memory = lambda: free
        message = messages.Load(job=1, model=specs[number], parallel=ParallelSpec(ranks=ranks))
        assert type(pipeline.load(Job(message, Client(), pipeline.device))) is messages.Done
        return held()

    def held():
        paths, models = [spec.path for spec in specs], pipeline.components.models
        return [one and paths.index(one.key.spec.path) for one in (models.in_use, models.waiting)]

    plenty = 2**40
    assert load(0, plenty) == [0, None]
    weights = pipeline.components.models.in_use.model.high_noise.parameters()
    nbytes = sum(weight.nbytes for weight in weights if weight.dtype == torch.bfloat16)
    enough = memory.ROOM + ranks * nbytes
    pipeline.components.free()

    load(1, plenty)
    assert load(0, enough if rank else plenty) == [0, 1], "the others' memory counts too"
    assert load(1, 0) == [1, 0], "on a CPU both are there already"

    pipeline.components.free()
    load(1, plenty)
    assert load(0, enough - 1 if rank else plenty) == [0, None], "short on one rank: dropped on all"

    load(1, plenty)
    if rank:
        DiffusionModels.drop_waiting(pipeline.components.models)
    assert load(1, plenty) == [1, None], "dropped by one rank: dropped by all"
    dist.barrier()
    dist.destroy_process_group()
