"""`python -m ascend_runtime inspect`: what is there, and what keeps it from being used."""

import shutil
import subprocess
import sys
from pathlib import Path

import original_formats
import pytest
import torch
from ascend_runtime import inspection
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def told(capsys):
    """`told(path)`: (exit status, what is printed)."""

    def run(path):
        status = inspection.run(type("Arguments", (), {"path": str(path)}))
        return status, capsys.readouterr().out

    return run


def test_a_diffusers_folder(told):
    command = [sys.executable, "-m", "ascend_runtime", "inspect", str(ROOT / "assets" / "tiny_wan")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, transformer, text_encoder, vae, family = done.stdout.splitlines()
    assert header.split() == list(inspection.COLUMNS)
    for part, line in (("transformer", transformer), ("text_encoder", text_encoder), ("vae", vae)):
        assert line.startswith(part) and "diffusers" in line and "bfloat16" in line and line.endswith("whole"), line
    assert "Wan2.1-T2V" in family and "50 steps, shift 5, guidance 5" in family


def test_a_component_of_a_diffusers_folder(told):
    status, text = told(ROOT / "assets" / "tiny_wan" / "vae")
    assert status == 0 and len(text.splitlines()) == 2 and text.splitlines()[1].startswith("vae  ")


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
    assert status == 1 and "not whole" in text and "1 missing: proj_out.bias" in text


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
