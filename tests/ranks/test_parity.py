"""One rank equals diffusers' own WanPipeline with the same weights and the same seed, in fp32."""

import numpy as np
import pytest
import tiny_models
import torch
from ascend_runtime import SampleSpec, VideoSize
from ascend_runtime.engine.sampling import simple_sigmas
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
PROMPT, NEGATIVE = "a red ball moves left to right", "blurry"
SIZE = VideoSize(width=80, height=64, num_frames=9)
STEPS, SHIFT, SEED = 4, 3.0, 7
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT),
}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_models.wan_pipeline()


@pytest.fixture(scope="module")
def pipeline_of_two_experts():
    return tiny_models.wan_pipeline(experts=2)


def theirs(pipeline, solver="unipc", seed=SEED, **arguments):
    """diffusers' latent and frames [T,H,W,3]; the latent as ours are, not normalised."""
    pipeline.scheduler = SCHEDULERS[solver]()
    arguments = {"guidance_scale": 4.0, "prompt": PROMPT, "negative_prompt": NEGATIVE, **arguments}
    latent = pipeline(
        height=SIZE.height,
        width=SIZE.width,
        num_frames=SIZE.num_frames,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **arguments,
    ).frames
    return tiny_models.denormalised(latent, pipeline.vae)


def ours(runtime, specs, *, batch=1, seed=SEED, prompt=PROMPT, **arguments):
    """Our latent, by way of the encoder."""
    spec = SampleSpec(seed=seed, **{"steps": STEPS, "shift": SHIFT, "guidance_scale": 4.0, **arguments})
    positive = runtime.encode(specs.encoder, prompt).tensor
    negative = runtime.encode(specs.encoder, NEGATIVE).tensor if spec.guidance_scale != 1 else None
    latent = torch.zeros(batch, *SIZE.latent_shape()[1:])
    return runtime.sample(specs.model, spec, latent, positive, negative).tensor


@pytest.mark.parametrize("prompt", ["", PROMPT, " two   spaces &amp; an entity &lt;b&gt;", "a word " * 600])
def test_text_embeddings(one_rank, specs, pipeline, prompt):
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    assert expected[:, 0].std() > 0.1
    assert_close(one_rank.encode(specs.encoder, prompt).tensor, expected, **TOLERANCE)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_latent_and_frames_with_schedule_wan(one_rank, specs, pipeline, solver):
    expected = theirs(pipeline, solver)
    latent = ours(one_rank, specs, solver=solver)
    assert expected.std() > 0.1
    assert_close(latent, expected, **TOLERANCE)
    with torch.no_grad():
        video = pipeline.vae.decode(expected).sample
    frames = pipeline.video_processor.postprocess_video(video, output_type="pt")[0].permute(0, 2, 3, 1)
    assert frames.std() > 0.01 and frames.shape == (SIZE.num_frames, SIZE.height, SIZE.width, 3)
    assert_close(one_rank.decode(specs.vae, latent).tensor, frames, **TOLERANCE)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_guidance_scale_1_needs_no_negative_prompt(one_rank, specs, pipeline, solver):
    expected = theirs(pipeline, solver, guidance_scale=1.0)
    assert_close(ours(one_rank, specs, solver=solver, guidance_scale=1.0), expected, **TOLERANCE)


def test_two_experts_with_a_guidance_scale_each(one_rank, specs_of, checkpoints, pipeline_of_two_experts):
    specs = specs_of(checkpoints(experts=2))
    pipeline = pipeline_of_two_experts
    pipeline.scheduler = SCHEDULERS["unipc"]()
    pipeline.scheduler.set_timesteps(STEPS)
    high = pipeline.scheduler.timesteps >= 875
    assert high.any() and not high.all(), "the steps do not cross the boundary"
    expected = theirs(pipeline, guidance_scale=4.0, guidance_scale_2=2.5)
    latent = ours(one_rank, specs, guidance_scale=4.0, guidance_scale_low_noise=2.5)
    assert_close(latent, expected, **TOLERANCE)
    assert (ours(one_rank, specs) - expected).abs().max() > 1e-3, "the low-noise guidance scale has no influence"


def test_a_batch_of_two(one_rank, specs, pipeline):
    prompts = [PROMPT, PROMPT]
    expected = theirs(pipeline, prompt=prompts, negative_prompt=[NEGATIVE] * 2)
    latent = ours(one_rank, specs, batch=2)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    assert_close(latent, expected, **TOLERANCE)
    frames = one_rank.decode(specs.vae, latent).tensor
    single = one_rank.decode(specs.vae, latent[1:]).tensor
    assert frames.shape[0] == 2 * SIZE.num_frames
    assert_close(frames[SIZE.num_frames :], single, **TOLERANCE)


def test_the_seed_decides(one_rank, specs, pipeline):
    first, again, other = (ours(one_rank, specs, seed=seed) for seed in (SEED, SEED, SEED + 1))
    assert_close(first, again, atol=1e-6, rtol=0.0)
    assert (first - other).abs().max() > 0.1
    assert_close(other, theirs(pipeline, seed=SEED + 1), **TOLERANCE)


# Euler over given sigmas: diffusers' scheduler and transformer in a loop of the test's own


def their_euler_loop(pipeline, sigmas, latent=None):
    """The latent, not normalised, after diffusers' Euler steps over `sigmas`, whose last one is the end."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=np.array(sigmas[:-1]))
    texts = pipeline.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512)
    x = torch.randn(SIZE.latent_shape(), generator=torch.Generator().manual_seed(SEED))
    if latent is not None:
        x = sigmas[0] * x + (1 - sigmas[0]) * latent
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (pipeline.transformer(x, t[None], text, return_dict=False)[0] for text in texts)
            x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x, return_dict=False)[0]
    return tiny_models.denormalised(x, pipeline.vae)


def test_euler_with_schedule_simple(one_rank, specs, pipeline):
    expected = their_euler_loop(pipeline, simple_sigmas(STEPS, SHIFT))
    assert_close(ours(one_rank, specs, solver="euler", schedule="simple"), expected, **TOLERANCE)


def test_given_sigmas_replace_the_schedule(one_rank, specs, pipeline):
    sigmas = (1.0, 0.9, 0.55, 0.2, 0.0)
    expected = their_euler_loop(pipeline, sigmas)
    assert_close(ours(one_rank, specs, solver="euler", sigmas=sigmas, steps=99), expected, **TOLERANCE)


def test_sampling_goes_on_from_a_latent(one_rank, specs, pipeline):
    """With sigmas that start below 1, noise is mixed into the latent given, as in image-to-image."""
    sigmas = (0.6, 0.3, 0.0)
    normalised = torch.randn(SIZE.latent_shape(), generator=torch.Generator().manual_seed(3))
    expected = their_euler_loop(pipeline, sigmas, normalised)
    text = [one_rank.encode(specs.encoder, prompt).tensor for prompt in (PROMPT, NEGATIVE)]
    spec = SampleSpec(seed=SEED, guidance_scale=4.0, solver="euler", sigmas=sigmas)
    start = tiny_models.denormalised(normalised, pipeline.vae)
    assert_close(one_rank.sample(specs.model, spec, start, *text).tensor, expected, **TOLERANCE)
