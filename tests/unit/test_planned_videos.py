"""The planner's models and videos: shapes without files, and steps of each expert as the sampler has them."""

from itertools import product

import pytest
from ascend_runtime import SampleSpec, VideoSize
from ascend_runtime.engine.sampling import schedule_of
from ascend_runtime.models.registry import families
from ascend_runtime.planner import models, videos
from ascend_runtime.planner.timing import schedules

PARAMETERS = {  # in 10^9, as published
    "Wan2.1-T2V-1.3B": 1.42, "Wan2.1-T2V-14B": 14.29, "Wan2.1-I2V-14B": 16.39, "Wan2.2-TI2V-5B": 5.0,
    "HunyuanVideo": 12.82,
}  # fmt: skip


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_the_planner_and_the_sampler_have_the_same_steps(family, solver):
    family = families()[family]
    for steps, shift, schedule in product((1, 4, 5, 20, 40, 50), (1.0, 3.0, 5.0, 12.0, 16.0), ("own", "simple")):
        spec = SampleSpec(steps=steps, shift=shift, schedule=schedule, solver=solver)
        sampled = schedule_of(spec, family)
        assert schedules.timesteps_of(spec, family) == pytest.approx(sampled, abs=2e-3), spec
        for boundary in (875.0, 900.0):
            planned = [timestep < boundary for timestep in schedules.timesteps_of(spec, family)]
            assert planned == [timestep < boundary for timestep in sampled], spec


def test_given_sigmas_are_the_planned_steps():
    spec = SampleSpec(sigmas=(1.0, 0.94, 0.83, 0.0), steps=4, shift=5.0, solver="unipc")
    family = families()["wan"]
    assert schedules.timesteps_of(spec, family) == pytest.approx(schedule_of(spec, family))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_model_has_its_published_number_of_parameters(name):
    model = models.published(name)
    assert round(model.experts[0].stored / 2e9, 2) == PARAMETERS[name]


def test_every_published_model_has_its_family_s_latents():
    for family in families().values():
        for known in family.published.values():
            assert family.parts.keys() >= known.parts.keys() >= {"text_encoder", "vae"}
            made, read = family.form(known.transformers[0]), family.vae_form(known.parts["vae"])
            assert (made.channels, made.spatial, made.temporal) == (read.channels, read.spatial, read.temporal)
    assert models.published("org/WAN2.1-T2V-1.3B-Diffusers") is models.published("Wan2.1-T2V-1.3B")


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Wan2.2-T2V-A14B"):
        models.published("Wan9")


def test_passes_of_two_experts_have_their_own_guidance():
    model = models.published("Wan2.2-T2V-A14B")
    video = videos.video_of(model, VideoSize())
    assert (video.shape, video.steps) == ((1, 16, 21, 60, 104), 40)
    assert [expert for expert, _ in video.passes] == [0] * 26 + [1] * 14 and video.guided
    one = videos.video_of(model, VideoSize(), SampleSpec(guidance_scale=1.0, guidance_scale_low_noise=3.0))
    assert set(one.passes) == {(0, 1), (1, 2)}


def test_tokens_have_timesteps_of_their_own_in_models_that_see_known_frames_clean():
    wan = models.published("Wan2.2-TI2V-5B")
    size = wan.defaults.size
    assert videos.video_of(wan, size, from_image=True).per_token and not videos.video_of(wan, size).per_token
    assert not videos.video_of(models.published("Wan2.2-I2V-A14B"), VideoSize(), from_image=True).per_token
