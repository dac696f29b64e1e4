"""Models and LoRAs that were distilled to few steps: recognised by names and metadata, run with their own settings."""

import json

import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, SampleSpec, model_defaults
from ascend_runtime.models.hunyuan_video.defaults import DISTILLATIONS as HUNYUAN
from ascend_runtime.models.hunyuan_video.defaults import TEXT
from ascend_runtime.models.wan.defaults import DISTILLATIONS, WAN21_TEXT, WAN22_TEXT
from ascend_runtime.recognition.distilled import with_distillation
from safetensors.torch import save_file

FOUR = [1.0, 0.9375, 0.8333, 0.625, 0.0]


def own_of(*loras, path="model.safetensors", low_noise=None, own=WAN21_TEXT, experts=1, kinds=DISTILLATIONS):
    spec = DiffusionModelSpec(path=path, low_noise_path=low_noise, loras=loras)
    return with_distillation(own, kinds, spec, experts)


@pytest.mark.parametrize("name, kind, steps, sigmas", [
    ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "LightX2V", 4, FOUR),
    ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "LightX2V", 4, FOUR),
    ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", "LightX2V", 4, FOUR),
    ("Wan2.1-Lightning-8steps.safetensors", "LightX2V", 8, None),
    ("self_forcing_dmd.pt", "Self-Forcing", 4, FOUR),
    ("Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors", "CausVid", 3, [1.0, 0.757, 0.522, 0.0]),
    ("FastWan2.1-T2V-1.3B-Diffusers", "FastWan", 3, [1.0, 0.757, 0.522, 0.0]),
    ("Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors", "rCM", 4, [1.0, 0.9338, 0.8529, 0.609, 0.0]),
    ("wan2.2-t2v-rapid-aio-v10.safetensors", "Rapid AIO", 4, FOUR),
])  # fmt: skip
def test_names_of_published_files(name, kind, steps, sigmas):
    from_lora, from_model = own_of(LoraSpec(path=f"/loras/{name}")), own_of(path=f"/models/{name}")
    assert from_lora == from_model and from_lora.distilled == kind
    filled = from_lora.fill(SampleSpec(), pixels=1)
    assert (filled.total_steps, filled.guidance_scale, filled.low_noise_guidance, filled.solver) == (
        steps, 1.0, 1.0, "euler"
    )  # fmt: skip
    if sigmas is not None:
        made = filled.sigmas or [filled.shift * s / (1 + (filled.shift - 1) * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
        assert made == pytest.approx(sigmas, abs=1e-4)


@pytest.mark.parametrize("name", [
    "Wan2.1-T2V-14B.safetensors", "lightning_storm.safetensors", "lightx2v_fp8.safetensors", "charcoal.safetensors",
    "my_character_1500steps.safetensors", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "arcm.safetensors",
])  # fmt: skip
def test_names_of_others(name):
    assert own_of(LoraSpec(path=f"/loras/{name}"), path=f"/models/{name}") == WAN21_TEXT


def test_a_folder_names_files_that_say_nothing():
    """LightX2V calls the LoRAs of the two experts alike in each of its folders."""
    folder = "/loras/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    assert own_of(LoraSpec(path=f"{folder}/high_noise_model.safetensors")).distilled == "LightX2V"
    assert own_of(LoraSpec(path=f"{folder}/a_style.safetensors")) == WAN21_TEXT


def test_what_is_given_stays():
    own = own_of(LoraSpec(path="/causvid.safetensors"))
    assert own.fill(SampleSpec(steps=6), pixels=1).sigmas is None
    assert own.fill(SampleSpec(shift=3.0), pixels=1).sigmas is None
    assert own.fill(SampleSpec(guidance_scale=4.0), pixels=1).guidance_scale == 4.0
    assert own_of(LoraSpec(path="/causvid.safetensors", strength=0.0)) == WAN21_TEXT, "it has no effect"


def test_both_experts_must_be_distilled():
    high, low = (LoraSpec(path=f"/lightx2v_4steps_{one}.safetensors", expert=f"{one}_noise") for one in ("high", "low"))
    assert own_of(low, own=WAN22_TEXT, experts=2) == WAN22_TEXT
    made = own_of(high, low, own=WAN22_TEXT, experts=2)
    assert (made.steps, made.shift, made.boundary, made.low_noise_guidance) == (4, 5.0, 0.875, None)
    by_file = own_of(low, path="/wan2.2_t2v_high_noise_lightx2v_4step.safetensors", low_noise="/low.safetensors",
                     own=WAN22_TEXT, experts=2)  # fmt: skip
    assert by_file.distilled == "LightX2V"


def test_a_distilled_hunyuan_video():
    made = own_of(path="/fast_hunyuan_video_t2v_720p_bf16.safetensors", own=TEXT, kinds=HUNYUAN)
    assert (made.steps, made.shift, made.guidance_scale, made.embedded_guidance) == (6, 17.0, 1.0, 6.0)


def test_metadata_of_files(tmp_path):
    file = tmp_path / "unnamed.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"modelspec.title": "Wan lightx2v 4-step LoRA"})
    assert own_of(LoraSpec(path=str(file))).distilled == "LightX2V"
    save_file({"a": torch.zeros(1)}, file, metadata={"modelspec.title": "Wan of a cat"})
    assert own_of(LoraSpec(path=str(file))).distilled is None, "read again as it changed"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanDMDPipeline"}))
    assert own_of(path=str(tmp_path)).distilled == "FastWan"


def test_a_models_own_file_counts_before_its_name(tmp_path):
    file = random_wan.original_transformer(tmp_path / "causvid", seed=8, layers=1)
    named = file.rename(tmp_path / "causvid.safetensors")
    assert model_defaults(str(named)).distilled == "CausVid"
    named.with_name("causvid.safetensors.ascend_defaults.json").write_text('{"steps": 9}')
    own = model_defaults(str(named))
    assert (own.steps, own.distilled) == (9, None)
