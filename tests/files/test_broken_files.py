"""A broken file is refused in words, or was broken where it does not matter: never a crash, a hang or half of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import described_folders
import hunyuan_formats
import hunyuan_lora
import original_formats as formats
import pytest
import random_hunyuan
import random_wan
import tiny_models
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).resolve().parents[2]
TEXT_DIM = 16


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One file or folder of each kind and container."""
    folder = tmp_path_factory.mktemp("files") / "sound"
    folder.mkdir()
    tensors = load_file(random_wan.original_transformer(folder / "transformer.safetensors", seed=1, layers=1))
    tensors["text_embedding.0.weight"] = tensors["text_embedding.0.weight"][:, :TEXT_DIM].contiguous()
    save_file(tensors, folder / "transformer.safetensors")
    kept, scales = formats.in_8_bits(tensors)
    formats.save_old_mark(folder / "transformer_fp8.safetensors", kept, scales)
    formats.save_new_mark(folder / "transformer_fp8_new.safetensors", kept, scales)
    torch.save(tensors, folder / "transformer.pth")
    formats.mindspeed_distributed(folder / "transformer_dcp", tensors)
    formats.mindspeed_release(folder / "transformer_release", tensors, (1,))
    formats.original_folder(folder / "transformer_original", tensors)
    tiny_models.save(tiny_models.wan_pipeline(layers=1, text_layers=1), folder / "diffusers")
    torch.save(formats.original_vae(tiny_models.randomise(AutoencoderKLWan(base_dim=4), 2)), folder / "vae.pth")
    config = UMT5Config(vocab_size=40, d_model=TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=1)
    encoder = tiny_models.randomise(UMT5EncoderModel(config), 3)
    umt5 = formats.comfyui_umt5(encoder, formats.sentencepiece_model(), torch.float16)
    save_file(umt5, folder / "text_encoder.safetensors")
    dim = tensors["blocks.0.ffn.0.weight"].shape[1]
    low_rank = {"lora_down.weight": torch.randn(4, dim), "lora_up.weight": torch.randn(dim, 4)}
    lora = {f"lora_unet_blocks_0_self_attn_q.{name}": x for name, x in low_rank.items()}
    save_file(lora, folder / "lora.safetensors")
    hunyuan_files(folder)
    return folder


def hunyuan_files(folder):
    network = random_hunyuan.transformer(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    state = network.state_dict()
    tensors = hunyuan_formats.original_transformer(state)
    save_file(tensors, folder / "transformer_hunyuan.safetensors")
    save_file(hunyuan_formats.comfyui_transformer(state), folder / "transformer_hunyuan_core.safetensors")
    torch.save({"module": tensors}, folder / "transformer_hunyuan.pt")
    kept, scales = formats.in_8_bits(tensors)
    formats.save_old_mark(folder / "transformer_hunyuan_fp8.safetensors", kept, scales)
    formats.save_new_mark(folder / "transformer_hunyuan_fp8_new.safetensors", kept, scales)
    (folder / "transformer_hunyuan_pair").mkdir()
    hunyuan_formats.original_fp8(folder / "transformer_hunyuan_pair", tensors)
    described_folders.write(folder / "transformer_hunyuan_int8", tensors)
    network.save_pretrained(folder / "diffusers_hunyuan" / "transformer")
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    vae.save_pretrained(folder / "diffusers_hunyuan" / "vae")
    save_file(hunyuan_formats.comfyui_vae(vae.state_dict()), folder / "vae_hunyuan.safetensors")
    for layout in ("musubi-tuner", "diffusers"):
        hunyuan_lora.save(folder / f"lora_hunyuan_{layout}.safetensors", layout, state)


def test_broken_files(sound, request):
    seed = int.from_bytes(os.urandom(4), "little")
    count = 800 if request.config.getoption("--all-broken-files") else 80
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "broken_files.py"), str(sound), str(seed), str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    print(f"seed {seed}: {done.stdout}")
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == count
    for family in ("wan", "hunyuan_video"):
        own = {outcome: n for outcome, n in outcomes.items() if outcome.startswith(family)}
        refused = sum(n for outcome, n in own.items() if outcome.endswith("refused"))
        assert refused > sum(own.values()) / 4, "it breaks files"
