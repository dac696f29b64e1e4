"""Real files that cannot be used, given to real ranks: the error that arrives at the caller begins with the code of its
cause, and has no other. Deaths of ranks are in test_kills.py,
test_hard_times.py and test_lifecycle.py; a plane beyond the memory in test_vae_tiles.py."""

import json
import re
import shutil

import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.errors import CODES, code_of
from safetensors.torch import load_file, save_file

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5676070424\n"
PAGE = b"<!DOCTYPE html><html><body>Log in to download this file.</body></html>"


def bytes_in_the_place_of_weights(content):
    def load(runtime, folder):
        (folder / WEIGHTS).write_bytes(content)
        runtime.load(DiffusionModelSpec(path=str(folder)))

    return load


def other_tensors(change):
    """The weights as `change` leaves them."""

    def load(runtime, folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        runtime.load(DiffusionModelSpec(path=str(folder)))

    return load


def other_config(part, **changes):
    def load(runtime, folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        runtime.load(DiffusionModelSpec(path=str(folder)), vae=VaeSpec(path=str(folder)))

    return load


def nowhere(runtime, folder):
    runtime.load(DiffusionModelSpec(path=str(folder / "nowhere")))


def cut(runtime, folder):
    content = (folder / WEIGHTS).read_bytes()
    bytes_in_the_place_of_weights(content[: len(content) // 2])(runtime, folder)


def one_of_two_shards(runtime, folder):
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    index = {"metadata": {}, "weight_map": {"blocks.0": names[0], "blocks.1": names[1]}}
    (folder / WEIGHTS).rename(folder / "transformer" / names[0])
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    runtime.load(DiffusionModelSpec(path=str(folder)))


def unknown_network(runtime, folder):
    save_file({"model.layers.0.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    runtime.load(DiffusionModelSpec(path=str(folder / "other.safetensors")))


def config_cut(runtime, folder):
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text()[:40])
    runtime.load(DiffusionModelSpec(path=str(folder)))


def two_networks_in_a_folder(runtime, folder):
    shards = folder / "shards"
    shards.mkdir()
    for name in ("one-00001-of-00001", "two-00001-of-00001"):
        shutil.copy(folder / WEIGHTS, shards / f"{name}.safetensors")
    runtime.load(DiffusionModelSpec(path=str(shards)))


def vae_as_model(runtime, folder):
    runtime.load(DiffusionModelSpec(path=str(folder / "vae" / "diffusion_pytorch_model.safetensors")))


def folder_of_the_vae_as_model(runtime, folder):
    runtime.load(DiffusionModelSpec(path=str(folder / "vae")))


def one_file_as_both_experts(runtime, folder):
    file = str(random_wan.original_transformer(folder / "wan.safetensors", layers=1))
    runtime.load(DiffusionModelSpec(path=file, low_noise_path=file))


def lora(tensors):
    def load(runtime, folder):
        save_file(tensors, folder / "lora.safetensors")
        runtime.load(DiffusionModelSpec(path=str(folder), loras=(LoraSpec(path=str(folder / "lora.safetensors")),)))

    return load


def lora_on_8_bits(runtime, folder):
    tensors = {"lora_A.weight": torch.ones(2, 96), "lora_B.weight": torch.ones(96, 2), "dora_scale": torch.ones(96, 1)}
    layer = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{layer}.{end}": x for end, x in tensors.items()}, folder / "lora.safetensors")
    loras = (LoraSpec(path=str(folder / "lora.safetensors")),)
    runtime.load(DiffusionModelSpec(path=str(folder), loras=loras, quantization="w8a8_dynamic"))


def tokenizer(change):
    def load(runtime, folder):
        change(folder / "tokenizer")
        runtime.load(encoder=TextEncoderSpec(path=str(folder)))

    return load


def fewer_embeddings(runtime, folder):
    shutil.rmtree(folder / "text_encoder")
    tiny_models.umt5(vocabulary=20).save_pretrained(folder / "text_encoder")
    runtime.load(encoder=TextEncoderSpec(path=str(folder)))


def spoil(folder):
    for file in folder.glob("*"):
        if file.name in ("tokenizer.json", "spiece.model"):
            file.write_bytes(b"\x01\x02" * 50)


def code_in_the_folder(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "own.Tokenizer"}}))


SITUATIONS = [
    ("AV-1301", nowhere),
    ("AV-1302", bytes_in_the_place_of_weights(b"")),
    ("AV-1302", cut),
    ("AV-1303", bytes_in_the_place_of_weights(POINTER)),
    ("AV-1304", bytes_in_the_place_of_weights(PAGE)),
    ("AV-1305", bytes_in_the_place_of_weights(b"GGUF" + bytes(100))),
    ("AV-1306", bytes_in_the_place_of_weights(b"These are my notes about the model, not the model.")),
    ("AV-1307", one_of_two_shards),
    ("AV-1308", unknown_network),
    ("AV-1309", config_cut),
    ("AV-1309", other_config("transformer", num_layers=10**9)),
    ("AV-1310", two_networks_in_a_folder),
    ("AV-1311", other_config("vae", in_channels=4)),
    ("AV-1312", tokenizer(code_in_the_folder)),
    ("AV-1317", other_tensors(lambda tensors: tensors["proj_out.weight"].fill_(float("nan")))),
    ("AV-1401", other_tensors(lambda tensors: tensors.pop("blocks.1.ffn.net.2.weight"))),
    ("AV-1402", vae_as_model),
    ("AV-1402", folder_of_the_vae_as_model),
    ("AV-1403", one_file_as_both_experts),
    ("AV-1404", lora({"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)})),
    ("AV-1405", lora({"diffusion_model.blocks.0.self_attn.q.scalar": torch.ones(1)})),
    ("AV-1406", lora_on_8_bits),
    ("AV-1409", tokenizer(shutil.rmtree)),
    ("AV-1410", fewer_embeddings),
    ("AV-1411", tokenizer(spoil)),
]


@pytest.mark.parametrize("code, situation", SITUATIONS)
def test_a_real_situation_has_its_code_in_front_and_no_other(one_rank, checkpoint, tmp_path, code, situation):
    one_rank.start()
    before, folder = one_rank.pids, shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises(ValueError) as error:
        situation(one_rank, folder)
    text = str(error.value)
    assert code_of(text) == code in CODES, text
    assert re.findall(r"AV-\d{4}", text) == [code], text
    assert one_rank.pids == before, "the ranks stay"
