"""A rank that makes a latent twice, for a test: by a job, and by asking a Generation for every velocity itself.

`main()` by gloo_ranks, in FOLDER, which holds a checkpoint ("model") and cases.json: for each case the plan, the
guidance scale, the solver, and whether a part of the video is known. The rank writes whether both latents are equal to
the bit, and how large they are, to equal-RANK.json.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime import AccelerationSpec, BlockCacheSpec, Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.engine.generation import NetworkCall, Generation, Ranks, Request, check_request
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.engine.sampling import SolverStep, make_scheduler, noise_of
from ascend_runtime.models.shared.conditioning import Given
from ascend_runtime.wire import messages
from ascend_runtime.wire.channel import channel_pair

SHAPE = (1, 16, 3, 4, 6)


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    pipeline, (channel, other) = RankPipeline(torch.device("cpu")), channel_pair()
    found = []
    for case in json.loads((folder / "cases.json").read_text()):
        message = message_of(case, folder)
        by_job = pipeline.sample(Job(message, channel, pipeline.device)).tensor
        by_hand = looped(pipeline, message)
        found.append([by_job is None or torch.equal(by_job, by_hand), by_hand.std().item()])
    (folder / f"equal-{rank}.json").write_text(json.dumps(found))
    other.close()
    dist.barrier()
    dist.destroy_process_group()


def message_of(case, folder):
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randn(1, 12, 32, generator=generator) for _ in range(2)]
    mask = torch.ones(1, 1, *SHAPE[2:])
    mask[:, :, 0] = 0
    scale = case["guidance_scale"]
    return messages.Sample(
        job=1,
        model=DiffusionModelSpec(path=str(folder / "model")),
        parallel=ParallelSpec(**case["plan"]),
        spec=SampleSpec(seed=3, steps=5, shift=5.0, guidance_scale=scale, solver=case["solver"]),
        latent=torch.randn(SHAPE, generator=generator),
        positive=Conditioning(text=texts[0]),
        negative=Conditioning(text=texts[1]) if scale != 1 else None,
        noise_mask=mask if case["known"] else None,
        acceleration=AccelerationSpec(block_cache=BlockCacheSpec(interval=2, start=1)),
    )


def looped(pipeline, message):
    """The latent of a job, by a loop of this test: noise, known frames, guidance and solver as their formulas say."""
    model = pipeline.components.get(message.model, lambda *_: None)
    spec = model.defaults.fill(message.spec, model.pixels_of(SHAPE))
    prompts = {"positive": message.positive, "negative": message.negative}
    given = Given(message.latent, message.noise_mask, {name: one for name, one in prompts.items() if one is not None})
    request = Request(given, spec, message.acceleration)
    check_request(model, request)
    plan = message.parallel.resolve(dist.get_world_size(), guided=model.guided(spec))
    ranks = Ranks.arranged(plan, message.parallel, message.operators, model, {})
    generation = Generation.prepare(model, request, ranks)
    scheduler = make_scheduler(spec, model.family)
    mean, std = model.latents.mean, model.latents.std
    x, clean = noise_of(SHAPE, spec.seed), (message.latent - mean) / std
    known_noise = noise_of(SHAPE, spec.seed)
    branches = ("cond",) if spec.guidance_scale == 1 else ("cond", "uncond")
    timesteps = [*map(float, scheduler.timesteps), None]
    for number, timestep in enumerate(scheduler.timesteps):
        sigma, seen = float(scheduler.sigmas[number]), x
        if message.noise_mask is not None:
            known = sigma * known_noise + (1 - sigma) * clean
            seen = x * message.noise_mask + known * (1 - message.noise_mask)
        calls = [NetworkCall(name, seen, timesteps[number], generation.contexts[name]) for name in branches]
        velocities = generation.velocity(calls, SolverStep(number, timesteps[number + 1]))
        assert len(velocities) == len(calls)
        velocity = velocities[0].float()
        if len(velocities) == 2:
            velocity = velocities[1].float() + spec.guidance_scale * (velocities[0].float() - velocities[1].float())
        if message.noise_mask is not None:
            x0 = (seen - sigma * velocity) * message.noise_mask + clean * (1 - message.noise_mask)
            velocity = (x - x0) / sigma
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    generation.finish()
    return x / (1 - float(scheduler.sigmas[-1])) * std + mean
