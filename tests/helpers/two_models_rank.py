"""A rank that loads two models by turns, on a host whose memory is pretended, and moves what FSDP shards (see
tests/ranks/test_two_models.py).

The models, `model-0` and `model-1` of FOLDER, are in float32. What is kept in bfloat16 is not mapped from the files.
"""

import weakref

import gloo_ranks
import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.components import HostMemory, diffusion_model
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.hardware import devices, memory
from ascend_runtime.parallel.fsdp import own_part
from ascend_runtime.wire import messages


class Client:
    """A channel to a client that says nothing, and hears everything."""

    def take(self):
        return None

    def send(self, message):
        pass


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    pipeline = RankPipeline(torch.device("cpu"))
    specs = [DiffusionModelSpec(path=str(folder / f"model-{number}"), dtype="bfloat16") for number in range(2)]
    move_shards(pipeline, specs[0], ranks)
    call_models_by_turns(pipeline, specs, ranks)
    load_by_turns(pipeline, specs, rank, ranks)
    dist.barrier()
    dist.destroy_process_group()


def move_shards(pipeline, spec, ranks):
    """FSDP refers to its shards, and computes with those that came back."""
    text = Conditioning(text=torch.randn(1, 12, tiny_models.TEXT_DIM, generator=torch.Generator().manual_seed(1)))
    message = messages.Sample(
        job=1, model=spec, parallel=ParallelSpec(ranks=ranks, fsdp=True), latent=torch.zeros(1, 16, 2, 4, 6),
        spec=SampleSpec(seed=3, steps=2, shift=5.0, guidance_scale=1.0), positive=text,
    )  # fmt: skip
    made = []
    for _ in range(2):
        made.append(pipeline.sample(Job(message, Client(), pipeline.device)).tensor)
        network = pipeline.components.models.in_use.model.high_noise
        shards = [own_part(weight).detach() for weight in network.parameters()]
        network._apply(torch.clone)  # as Module.to moves them
        for shard in shards:
            shard.view(torch.uint8).fill_(255)  # NaN
    assert made[0] is made[1] is None or torch.equal(*made) and made[0].std() > 0.1
    pipeline.components.free()


def call_models_by_turns(pipeline, specs, ranks):
    """On a full host, the first model is freed before the second is read, though a run of calls had begun."""
    devices.host_memory = lambda: 0
    read, freed = diffusion_model.Opened.read, []

    def watched(opened):
        freed.append(before() is None)
        return read(opened)

    for number, spec in enumerate(specs):
        setting = messages.CallSetting(model=spec, parallel=ParallelSpec(ranks=ranks),
                                       run=messages.SamplerRun(number=number + 1, sigmas=(1.0, 0.5, 0.0)))  # fmt: skip
        message = messages.Velocity(
            job=1, setting=setting, step=0, latents=[torch.zeros(1, 16, 2, 4, 6)],
            held={7: torch.zeros(1, 12, tiny_models.TEXT_DIM)},
            passes=[messages.ModelPass(branch="cond", latent=0, timesteps=torch.tensor([1000.0]), inputs={"text": 7})],
        )  # fmt: skip
        pipeline.velocity(Job(message, Client(), pipeline.device))
        before = weakref.ref(pipeline.components.models.in_use.model.high_noise)
        diffusion_model.Opened.read = watched
    assert freed == [True]
    diffusion_model.Opened.read = read
    pipeline.free(Job(messages.Free(job=1), Client(), pipeline.device))


def load_by_turns(pipeline, specs, rank, ranks):
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
        pipeline.components.models.drop_waiting(HostMemory(plenty))
    assert load(1, plenty) == [1, None], "dropped by one rank: dropped by all"
