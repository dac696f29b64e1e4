"""What the ranks say of a job for a video's metadata, as programs get it: `Result.record`."""

import msgspec
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec, VaeSpec
from ascend_runtime.checkpoints.digest import file_digest
from ascend_runtime.specs.record import JobRecord
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_both_experts_own_sigmas_and_the_plan_are_in_the_record(two_ranks, checkpoints, specs_of):
    folder = checkpoints(experts=2)
    specs = specs_of(folder)
    sigmas = (1.0, 0.9, 0.5, 0.0)
    result = two_ranks.sample(
        DiffusionModelSpec(path=str(folder), boundary=0.7), SampleSpec(seed=2**64 - 1, sigmas=sigmas, solver="euler"),
        torch.zeros(1, 16, 3, 8, 8), specs.text(1), specs.text(2),
        parallel=ParallelSpec(ranks=2, ulysses_degree=2, fsdp=True),
    )  # fmt: skip
    record = result.record
    assert [part.part for part in record.parts] == ["transformer"] * 2
    assert len({part.digest for part in record.parts}) == 2
    for name, part in zip(("transformer", "transformer_2"), record.parts):
        assert file_digest(folder / name / WEIGHTS) in part.files
    settings = {"seed": 2**64 - 1, "boundary": 0.7, "sigmas": [*sigmas], "solver": "euler", "experts": "resident"}
    assert settings.items() <= record.settings.items() and "schedule" not in record.settings
    assert record.plan["ulysses_degree"] == 2 and record.plan["cfg_degree"] == 1 and record.plan["fsdp"] is True
    assert record.size == [9, 64, 64] and record.seconds["denoise"] == round(result.seconds["denoise"], 4)
    assert msgspec.json.decode(msgspec.json.encode(record), type=JobRecord) == record


def test_a_lora_in_pefts_folder_has_its_digest_and_form(two_ranks, specs, tmp_path):
    q, file = "blocks.0.attn1.to_q", tmp_path / "adapter_model.safetensors"
    ends = {"lora_A.weight": (2, 96), "lora_B.weight": (96, 2), "lora_magnitude_vector": (96,)}
    save_file({f"base_model.model.{q}.{end}": torch.ones(shape) for end, shape in ends.items()}, file)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "use_dora": true}')
    model = specs.model.with_lora(LoraSpec(path=str(tmp_path), strength=0.5))
    latent, text = torch.zeros(1, 16, 2, 4, 6), specs.text(1)
    (lora,) = two_ranks.sample(model, SampleSpec(steps=1, guidance_scale=1.0), latent, text).record.loras
    assert (lora.file, lora.form, lora.strength) == (file_digest(file), "DoRA", 0.5)


def test_encoding_a_video_is_a_job_of_its_own_kind(two_ranks, checkpoint):
    result = two_ranks.encode_video(VaeSpec(path=str(checkpoint)), torch.rand(5, 32, 48, 3))
    assert (result.record.kind, result.record.size) == ("encode video", [5, 32, 48])
    assert result.record.host.ranks == 2 and result.record.parts[0].part == "vae"


def test_a_job_that_makes_no_part_of_a_video_has_no_record(two_ranks, specs):
    assert two_ranks.ping().record is two_ranks.load(specs.model).record is None
