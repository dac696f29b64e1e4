"""What a model is run with where the user does not say."""

import pytest
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan.defaults import WAN21_IMAGE, WAN22_TEXT, defaults_of
from ascend_runtime.specs import SampleSpec, VideoSize

IMAGE = {"in_channels": 36, "out_channels": 16}
CLIP = {**IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}


@pytest.mark.parametrize("config, experts, name, steps, shift, guidance, low_noise, boundary", [
    ({"in_channels": 16, "out_channels": 16}, 1, "Wan2.1-T2V", 50, 5, 5, None, None),
    (CLIP, 1, "Wan2.1-I2V-14B", 40, 5, 5, None, None),
    ({**CLIP, "pos_embed_seq_len": 514}, 1, "Wan2.1-FLF2V-14B", 50, 16, 5, None, None),
    ({"in_channels": 16, "out_channels": 16}, 2, "Wan2.2-T2V-A14B", 40, 12, 4, 3, 0.875),
    (IMAGE, 2, "Wan2.2-I2V-A14B", 40, 5, 3.5, 3.5, 0.9),
    ({"in_channels": 48, "out_channels": 48}, 1, "Wan2.2-TI2V-5B", 50, 5, 5, None, None),
])  # fmt: skip
def test_each_published_model(config, experts, name, steps, shift, guidance, low_noise, boundary):
    own = defaults_of(config, experts)
    assert (own.name, own.boundary) == (name, boundary)
    filled = own.fill(SampleSpec(), pixels=1280 * 720)
    assert (filled.steps, filled.shift, filled.guidance_scale) == (steps, shift, guidance)
    assert filled.low_noise_guidance == (guidance if low_noise is None else low_noise)


def test_a_small_picture_takes_another_shift_only_where_the_original_does():
    assert WAN21_IMAGE.fill(SampleSpec(), pixels=480 * 832).shift == 3
    assert WAN22_TEXT.fill(SampleSpec(), pixels=480 * 832).shift == 12
    assert WAN21_IMAGE.fill(SampleSpec(shift=7.0), pixels=480 * 832).shift == 7


def test_what_is_given_stays():
    filled = WAN22_TEXT.fill(SampleSpec(guidance_scale=1.0), pixels=1)
    assert (filled.guidance_scale, filled.low_noise_guidance, filled.steps) == (1.0, 1.0, 40), "both experts'"
    filled = WAN22_TEXT.fill(SampleSpec(guidance_scale_low_noise=2.0, steps=4), pixels=1)
    assert (filled.guidance_scale, filled.low_noise_guidance, filled.steps) == (4.0, 2.0, 4)


@pytest.mark.parametrize("config, name, embedded", [
    ({}, "HunyuanVideo", 6.0),  # as diffusers writes a text-to-video model's
    ({"image_condition_type": "token_replace"}, "HunyuanVideo-I2V", 6.0),
    ({"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
     "HunyuanVideo-I2V (33 channels)", None),
])  # fmt: skip
def test_each_published_hunyuan_video_model(config, name, embedded):
    own = family("hunyuan_video").defaults(config, 1)
    filled = own.fill(SampleSpec(), pixels=1280 * 720)
    assert (own.name, own.fps, own.size) == (name, 24, VideoSize(width=1280, height=720, num_frames=129))
    assert (filled.steps, filled.shift, filled.solver, filled.guidance_scale) == (50, 7.0, "euler", 1.0)
    assert filled.embedded_guidance == embedded
    assert own.fill(SampleSpec(embedded_guidance=4.0, solver="unipc"), pixels=1).embedded_guidance == 4.0


def test_a_solver_is_the_models_own_unless_it_is_given():
    assert WAN22_TEXT.fill(SampleSpec(), pixels=1).solver == "unipc"
    assert WAN22_TEXT.fill(SampleSpec(solver="euler"), pixels=1).solver == "euler"
