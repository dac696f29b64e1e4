"""`python -m ascend_runtime inspect`: what is there, and what keeps it from being used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import original_formats
import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, TextEncoderSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.components import Components
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def told(capsys):
    """`told(path)`: (exit status, what is printed)."""

    def run(path):
        status = inspection.run(type("Arguments", (), {"path": str(path)}))
        return status, "".join(capsys.readouterr())

    return run


def test_a_diffusers_folder(told):
    command = [sys.executable, "-m", "ascend_runtime", "inspect", str(ROOT / "assets" / "tiny_wan")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, transformer, text_encoder, vae, family = done.stdout.splitlines()
    assert header.split() == list(inspection.PART_COLUMNS)
    for part, line in (("transformer", transformer), ("text_encoder", text_encoder), ("vae", vae)):
        assert line.startswith(part) and line.endswith(", complete"), line
        assert "diffusers" in line and "bfloat16" in line, line
    assert family == (
        "recognised as Wan2.1-T2V; default settings from ascend_defaults.json: 20 steps, shift 3, guidance 4, 64 x 64, "
        "17 frames at 16 fps"
    )


def test_a_component_of_a_diffusers_folder(told):
    status, text = told(ROOT / "assets" / "tiny_wan" / "vae")
    assert status == 0 and len(text.splitlines()) == 2 and text.splitlines()[1].startswith("vae  ")


def test_a_file_of_settings_that_cannot_be_used_is_a_fault(told, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=1), tmp_path / "model")
    status, text = told(folder)
    assert status == 0 and "Wan2.1-T2V; its default settings: 50 steps, shift 5, guidance 5, 832 x 480" in text
    (folder / "ascend_defaults.json").write_text('{"steps": -1}')
    status, text = told(folder)
    assert status == 1 and f"transformer: AV-1309: {folder}/ascend_defaults.json cannot be used: steps is -1" in text
    assert "default settings" not in text


def test_two_experts_one_of_which_is_gone(told, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=2), tmp_path / "model")
    status, text = told(folder)
    assert status == 0 and "transformer_2" in text
    assert "Wan2.2-T2V-A14B" in text and "guidance 4 and 3 (low noise), boundary 0.875" in text
    shutil.rmtree(folder / "transformer_2")
    status, text = told(folder)
    assert status == 1 and "transformer_2  -" in text and "missing" in text


def test_what_does_not_fit_is_named(told, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=1), tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file)
    status, text = told(folder)
    assert status == 1 and "incomplete" in text and "1 missing: proj_out.bias" in text


@pytest.fixture
def model(checkpoints, tmp_path):
    return shutil.copytree(checkpoints(experts=2), tmp_path / "model")


def wide(folder):
    """An image-to-video model's first layer in the place of a text-to-video model's."""
    file = folder / "diffusion_pytorch_model.safetensors"
    weight = load_file(file)["patch_embedding.weight"]
    save_file(load_file(file) | {"patch_embedding.weight": weight.repeat(1, 3, 1, 1, 1)[:, :36].contiguous()}, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "in_channels": 36}))


def exchanged(folder):
    for part, name in (("transformer", "low_noise"), ("transformer_2", "high_noise")):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(f"{name}.safetensors"))


def with_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage, kind, says", [
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "text_encoder",
     "Put the tokenizer's folder next to the text encoder"),
    (lambda folder: wide(folder / "transformer_2"), "transformer_2", "Use two experts of one model"),
    (exchanged, "transformer_2", "by their names they are swapped"),
    (lambda folder: with_index(folder, boundary_ratio="abc"), "transformer", "boundary_ratio 'abc'"),
])  # fmt: skip
def test_what_a_loader_refuses_is_not_whole(told, model, damage, kind, says):
    assert told(model)[0] == 0
    damage(model)
    spec = TextEncoderSpec if kind == "text_encoder" else DiffusionModelSpec
    with pytest.raises(ValueError) as error:
        Components(torch.device("cpu")).get(spec(path=str(model)), lambda *_: None)
    status, text = told(model)
    assert status == 1 and says in str(error.value) and f"{kind}: {error.value}" in text


def test_a_text_encoder_alone(told, tmp_path):
    """Without a tokenizer, with a broken one, and whole."""
    network = tiny_models.umt5()
    torch.save(original_formats.original_umt5(network), tmp_path / "umt5.pth")
    status, text = told(tmp_path / "umt5.pth")
    assert status == 1 and "incomplete" in text and "contains no tokenizer" in text
    for model, whole in ((b"broken", False), (original_formats.sentencepiece_model(), True)):
        save_file(original_formats.comfyui_umt5(network, model), tmp_path / "umt5.safetensors")
        status, text = told(tmp_path / "umt5.safetensors")
        assert (status == 0) == whole == ("sentencepiece model is damaged" not in text), text


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Of a transformer, by the original's names."""
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", layers=2))


@pytest.mark.parametrize("write", [
    lambda folder, tensors: original_formats.mindspeed_release(folder, tensors),
    lambda folder, tensors: original_formats.mindspeed_distributed(folder, tensors),
    lambda folder, tensors: original_formats.original_folder(folder / "high_noise_model", tensors),
])  # fmt: skip
def test_a_layout_of_transformers_alone_lacks_nothing(told, tensors, tmp_path, write):
    status, text = told(write(tmp_path / "model", tensors))
    header, transformer, *others, _ = text.splitlines()
    assert status == 0 and transformer.endswith(", complete"), text
    assert [line.split() for line in others] == [[part, *"-----"] for part in ("text_encoder", "vae")]


def test_a_model_of_the_original_without_its_other_parts(told, tensors, tmp_path):
    status, text = told(original_formats.original_folder(tmp_path / "Wan2.1-T2V-1.3B", tensors))
    assert status == 1 and text.count("missing") == 2 and "models_t5_umt5-xxl-enc-bf16.pth" in text


def test_what_convert_makes_of_a_text_encoder(told, tmp_path):
    network, tokenizer = tiny_models.umt5(), original_formats.sentencepiece_model()
    save_file(original_formats.comfyui_umt5(network, tokenizer), tmp_path / "umt5.safetensors")
    conversion.convert(
        conversion.planned(tmp_path / "umt5.safetensors", "diffusers", None, "5GB"), tmp_path / "made", {}
    )
    status, text = told(tmp_path / "made")
    assert status == 0 and "transformer   -" in text and "missing" not in text, text


def test_a_folder_of_loose_files_has_the_file_named(told, tensors, tmp_path):
    save_file(tensors, tmp_path / "wan.safetensors")
    status, text = told(tmp_path)
    assert status == 1 and text.count("\n") == 1 and text.endswith("Give its file wan.safetensors.\n")
    with pytest.raises(ValueError, match="Give its file wan.safetensors"):
        conversion.planned(tmp_path, "diffusers", None, "5GB")
    save_file(tensors, tmp_path / "other.safetensors")
    assert "Give one of its files, such as other.safetensors." in told(tmp_path)[1]


def test_single_files(told, tmp_path):
    file = tmp_path / "vae.pth"
    torch.save(original_formats.original_vae(AutoencoderKLWan(base_dim=4)), file)
    status, text = told(file)
    assert status == 0 and "transformer" not in text
    assert text.splitlines()[1].startswith("vae") and "original" in text
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    status, text = told(tmp_path / "x.safetensors")
    assert status == 1 and "Wan transformer, UMT5 text encoder, Wan VAE" in text
    status, text = told(tmp_path / "none")
    assert status == 1 and "does not exist" in text
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        status, text = told(path)
        assert status == 1 and f"{path} is neither a folder nor a file. Give" in text


def test_a_dtype_that_no_weights_have_is_named(told, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=1), tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "stranger": torch.zeros(2, dtype=torch.uint16)}, file)
    status, text = told(folder)
    assert status == 1 and "incomplete" in text and f"transformer: AV-1305: {file} holds stranger as U16" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all files")
def test_what_may_not_be_read_is_named(told, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints(experts=1), tmp_path / "model")
    for path in ("transformer/diffusion_pytorch_model.safetensors", "vae/config.json"):
        (folder / path).chmod(0)
        status, text = told(folder)
        assert status == 1 and f"{folder / path} cannot be read (Permission denied)" in text


def test_a_lora_has_its_forms_ranks_and_the_place_of_alpha(told, tmp_path):
    def pair(name, rank=4):
        return {f"{name}.lora_A.weight": torch.ones(rank, 8), f"{name}.lora_B.weight": torch.ones(8, rank)}

    tensors = pair("transformer.blocks.0.attn1.to_q") | pair("transformer_2.blocks.0.attn1.to_q", 8)
    tensors |= {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(8, 1), "text_encoder.q.alpha": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"lora_adapter_metadata": "{}"})
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        status, text = told(path)
        assert status == 0 and text.splitlines() == [
            "LoRA: DoRA (1 layer), low-rank pairs (1 layer)",
            "rank: 4, 8; alpha: in its header (lora_adapter_metadata)",
            "for: high_noise and low_noise",
            "left out: 1 tensors for text encoders",
        ]
    save_file(pair("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.scalar": torch.ones(1)}, tmp_path / "lora.sft")
    status, text = told(tmp_path / "lora.sft")
    assert status == 1 and text.splitlines()[1:] == [
        "rank: 4; alpha: none, so it is taken as the rank", "for: both experts, or the only one",
        "refused: 1 tensors of LyCORIS with a trained scalar",
    ]  # fmt: skip
