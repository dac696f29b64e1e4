"""A rank that does accelerated jobs by the real pipeline, for a test: `accelerated_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds jobs.bin, a list of messages as `save_jobs` writes them, and
schedules.json; the rank writes the latents of all jobs to out-RANK.safetensors (rank 0 has them), and to told-RANK.json
what each left out, and what it decided in each random schedule. The ranks meet in a file of the folder, at no port.
"""

import json
import random

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.wire import messages
from ascend_runtime.acceleration.accelerators import Acceleration, Outline
from ascend_runtime.models.shared.block_stack import At, BlockStack
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.specs import AccelerationSpec, Calibration, StepCacheSpec
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from safetensors.torch import save_file

CPU = torch.device("cpu")
BLOCKS, TOKENS = 3, 4


class Deaf:
    """A control connection that nobody speaks on."""

    def take(self):
        return None

    def send(self, message):
        pass


def save_jobs(folder, jobs):
    """Their tensors included."""
    torch.save([(parcel.body, [(at, tensor) for at, tensor in parcel.tensors], parcel.size)
                for parcel in map(messages.encode, jobs)], folder / "jobs.bin")  # fmt: skip


def load_jobs(folder):
    for body, tensors, size in torch.load(folder / "jobs.bin"):
        block = bytearray(size or 1)
        for at, tensor in tensors:
            block[at : at + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield messages.decode(body, block, [])


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    pipeline, latents, told = RankPipeline(CPU), {}, []
    for number, message in enumerate(load_jobs(folder)):
        done = pipeline.sample(Job(message, Deaf(), CPU))
        told.append(done.info["acceleration"])
        if rank == 0:
            latents[str(number)] = done.tensor.contiguous()
    schedules = json.loads((folder / "schedules.json").read_text())
    decided = [decisions(rank, ranks, **schedule) for schedule in schedules]
    save_file(latents, folder / f"out-{rank}.safetensors")
    (folder / f"told-{rank}.json").write_text(json.dumps({"jobs": told, "decided": decided}))
    dist.barrier()
    dist.destroy_process_group()


def decisions(rank, ranks, *, seed, spec, steps, switch, parallel, guided):
    """The steps that are left out of a job whose tokens and timesteps are random, others on each rank.

    switch: the step with which another expert begins. parallel: the upper half of the ranks computes uncond.
    guided: of each expert, whether it computes both branches.
    """
    alike, own = random.Random(seed), random.Random(seed * ranks + rank)
    experts = tuple("high_noise" if step < switch else "low_noise" for step in range(steps))
    known = {expert: Calibration(coefficients=tuple(alike.uniform(-2, 2) for _ in range(5)),
                                 ratios=(1.0, *(alike.uniform(0.9, 1.05) for _ in range(9))))
             for expert in set(experts)}  # fmt: skip
    outline = Outline(
        experts=experts, known=known, grid=(1, 1, TOKENS), own=own.randint(0, TOKENS), branches=2, output=1,
        room=10**9, ring=1, work=Work((BlockWork(1.0, 1.0, 1.0),) * BLOCKS, rest=1.0),
    )  # fmt: skip
    acceleration = Acceleration(AccelerationSpec(step_cache=StepCacheSpec(**spec)), outline)
    left_out = []
    for step, expert in enumerate(experts):
        if not guided[expert]:
            branches = ["cond"]
        elif parallel:
            branches = ["uncond" if rank >= ranks / 2 else "cond"]
        else:
            branches = ["cond", "uncond"]
        for branch in branches:
            timestep = torch.tensor([own.gauss(1, 0.1) for _ in range(6)]).view(1, 6, 1)
            run = []
            add = own.gauss
            stack = BlockStack(lambda block, x: (run.append(block), x + add(1, 0.05))[1], BLOCKS, lambda *_: timestep)
            acceleration.passing(At(expert, branch, step)).blocks(stack, torch.ones(1, TOKENS, 1))
            if len(run) < BLOCKS:
                left_out.append((step, branch))
    computed = sorted({step for step, _ in left_out})
    assert len(left_out) == sum(1 + (guided[experts[step]] and not parallel) for step in computed), "branches differ"
    return computed
