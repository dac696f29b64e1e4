"""Whole files whose contents cannot be a network's: refused by name, before anything is built or computed of them."""

import json
import shutil
from pathlib import Path

import original_formats as formats
import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.commands import inspection
from ascend_runtime.components import Components
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

Q = "blocks.0.self_attn.q"
SPECS = {"transformer": DiffusionModelSpec, "text_encoder": TextEncoderSpec, "vae": VaeSpec}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """By the original's names."""
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=12, layers=1))


def refused(path, kind="transformer"):
    with pytest.raises(ValueError) as error:
        Components(torch.device("cpu")).get(SPECS[kind](path=str(path)), lambda *_: None)
    return str(error.value)


def without(tensors, name):
    return {other: x for other, x in tensors.items() if other != name}


# 8 bits

MARKS = {formats.save_old_mark: "scale_weight", formats.save_new_mark: "weight_scale",
         formats.save_layer_marks: "weight_scale"}  # fmt: skip
WRONG_SCALES = {
    "1 without a scale: {weight}": lambda kept, scale: (kept, None),
    "1 with a scale, but not in 8 bits: {weight}": lambda kept, scale: (kept.float(), scale),
    "1 that are not a scale: {scale} [] of torch.int8": lambda kept, scale: (kept, torch.ones((), dtype=torch.int8)),
    "1 that are not a scale: {scale} [2] of torch.float32": lambda kept, scale: (kept, torch.ones(2)),
    "has the scale 0.0 in {scale}; it must be above 0": lambda kept, scale: (kept, torch.zeros(())),
    "has the scale -1.0 in {scale}": lambda kept, scale: (kept, -torch.ones(())),
    "has the scale nan in {scale}": lambda kept, scale: (kept, torch.tensor(float("nan"))),
    "has the scale inf in {scale}": lambda kept, scale: (kept, torch.tensor(1e300, dtype=torch.float64)),
}


@pytest.mark.parametrize("save", MARKS, ids=lambda save: save.__name__)
@pytest.mark.parametrize("says", WRONG_SCALES)
def test_each_weight_of_8_bits_has_its_scale(tmp_path, tensors, save, says):
    file, scale = tmp_path / "wan.safetensors", f"{Q}.{MARKS[save]}"
    save(file, *formats.in_8_bits(tensors))
    held = load_file(file)
    held[f"{Q}.weight"], held[scale] = WRONG_SCALES[says](held[f"{Q}.weight"], held[scale])
    marks = json.dumps({"layers": {name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in held
                                   if name.endswith(".weight_scale")}})  # fmt: skip
    header = {"_quantization_metadata": marks} if save is formats.save_new_mark else None
    save_file({name: x for name, x in held.items() if x is not None}, file, metadata=header)
    message = refused(file)
    assert str(file) in message and says.format(weight=f"{Q}.weight", scale=scale) in message, message


@pytest.mark.parametrize("mark", ["[]", "{", '{"layers": ["a"]}', '{"layers": {"a": "float8"}}', '{"layers": 3}'])
def test_marks_that_say_nothing(tmp_path, tensors, mark):
    file = tmp_path / "wan.safetensors"
    save_file(tensors, file, metadata={"_quantization_metadata": mark})
    assert f"{file}: the header's _quantization_metadata cannot be used (" in refused(file)


@pytest.mark.parametrize("mark", [torch.ones(3), torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor(3)], ids=str)
def test_marks_of_layers_that_say_nothing(tmp_path, tensors, mark):
    file = tmp_path / "wan.safetensors"
    save_file(tensors | {f"{Q}.comfy_quant": mark}, file)
    assert f"{file}: {Q}.comfy_quant cannot be used (" in refused(file)


# Tensors


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool], ids=str)
def test_whole_numbers_are_no_weights(tmp_path, tensors, dtype):
    file = tmp_path / "wan.safetensors"
    save_file(tensors | {f"{Q}.weight": torch.ones(256, 256, dtype=dtype)}, file)
    message = refused(file)
    assert f"{file} holds tensors 1 that are not floating-point: {Q}.weight as {dtype}" in message


SHAPES = {
    "makes 100 channels, which is not a multiple of 128": {"patch_embedding.weight": (100, 16, 1, 2, 2)},
    "1 of the wrong shape: patch_embedding.weight is [256, 16, 1, 0, 2]": {
        "patch_embedding.weight": (256, 16, 1, 0, 2)},
    "1 of the wrong shape: patch_embedding.weight is [256], and must have 5 dims": {"patch_embedding.weight": (256,)},
    "1 of the wrong shape: proj_out.weight is [], and must have 2 dims": {"head.head.weight": ()},
    "text_embedder.linear_1.weight is [256], and must have 2 dims": {"text_embedding.0.weight": (256,)},
    "there is no blocks.1, but blocks.99999.attn1.to_q.weight": {"blocks.99999.self_attn.q.weight": (1,)},
    "there is no blocks.1, but blocks.x.weight": {"blocks.x.weight": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("says", SHAPES)
def test_shapes_of_no_network(tmp_path, tensors, says):
    file = tmp_path / "wan.safetensors"
    save_file(tensors | {name: torch.zeros(shape) for name, shape in SHAPES[says].items()}, file)
    message = refused(file)
    assert str(file) in message and says in message, message


def test_a_vae_of_no_colours(tmp_path):
    tensors = formats.original_vae(AutoencoderKLWan(base_dim=4))
    conv = tensors["encoder.conv1.weight"]
    for channels in (1, 4, 5):
        tensors["encoder.conv1.weight"] = conv[:, :1].repeat(1, channels, 1, 1, 1)
        save_file(tensors, tmp_path / "vae.safetensors")
        message = refused(tmp_path / "vae.safetensors", "vae")
        assert "vae.safetensors: the Wan VAE in it" in message and f"reads {channels} channels" in message


# Networks that are near to what can be used


MORE = {  # what variants of a Wan transformer have more, by what they are
    "Wan VACE": "vace_blocks.0.after_proj.weight",
    "Wan Fun Control with a camera": "control_adapter.conv.weight",
    "Wan Animate": "face_adapter.fuser_blocks.0.linear1_q.weight",
    "Wan S2V (sound to video)": "casual_audio_encoder.weights",
    "an audio-driven model, such as HuMo": "blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q.weight",
    "SkyReels diffusion forcing": "fps_embedding.weight",
    "Wan SCAIL": "patch_embedding_pose.weight",
    "WanDancer": "patch_embedding_global.weight",
    "ReCamMaster": "blocks.0.cam_encoder.weight",
}


@pytest.mark.parametrize("what", MORE)
def test_variants_of_a_transformer_are_named(tmp_path, checkpoint, tensors, what, capsys):
    file, name = tmp_path / "wan.safetensors", MORE[what]
    save_file(tensors | {name: torch.zeros(2, 2)}, file)
    message = refused(file)
    assert f"{file} is not a plain Wan transformer. It is {what}, with 1 additional tensors" in message
    assert name.split(".")[-2] in message and "Use a text-to-video or" in message and "config.json" not in message
    assert inspection.run(type("Arguments", (), {"path": str(file)})) == 1
    assert f"It is {what}" in (said := capsys.readouterr().out) and "not usable" in said
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    save_file(load_file(weights) | {name: torch.zeros(2, 2)}, weights)
    assert f"It is {what}" in refused(folder)
    save_file({name: torch.zeros(2, 2)}, tmp_path / "only.safetensors")
    assert f"It is {what}" in refused(tmp_path / "only.safetensors")


def test_a_network_of_another_kind_is_not_asked_for_its_config(tmp_path, tensors):
    save_file(tensors | {"stranger.weight": torch.zeros(2)}, tmp_path / "wan.safetensors")
    message = refused(tmp_path / "wan.safetensors")
    assert "1 unexpected: stranger.weight. Is it another model's file?" in message


def test_a_t5_is_no_umt5(tmp_path):
    """Said before a tokenizer is missed: none lies there."""
    state = tiny_models.umt5().state_dict()
    t5 = {name: x.clone() for name, x in state.items() if "block.1.layer.0.SelfAttention.relative" not in name}
    for prefix in ("", "text_encoders.t5xxl.transformer."):
        save_file({f"{prefix}{name}": x for name, x in t5.items() if "embed_tokens" not in name}, tmp_path / "t5xxl")
        message = refused(tmp_path / "t5xxl", "text_encoder")
        assert "It is a T5, such as t5xxl of Flux and SD3, but Wan uses a UMT5. Use umt5_xxl" in message
        assert "tokenizer" not in message


def test_a_vae_that_enlarges_is_refused_before_it_decodes(tmp_path, checkpoint, capsys):
    """Wan 2.2's makes 12 channels too, of which 3 are each of 2 x 2 pixels: it reads as many."""
    tensors = formats.original_vae(AutoencoderKLWan(base_dim=4))
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        tensors[name] = tensors[name].repeat(4, *(1 for _ in tensors[name].shape[1:]))
    file, folder = tmp_path / "vae.safetensors", shutil.copytree(checkpoint, tmp_path / "folder")
    save_file(tensors, file)
    edit(folder / "vae" / "config.json", out_channels=12)
    for path, where in ((file, file), (folder, folder / "vae" / "config.json")):
        message = refused(path, "vae")
        assert f"{where} reads 3 channels and makes 12; RGB in patches of 1 x 1 has 3. It is a VAE" in message
        assert inspection.run(type("Arguments", (), {"path": str(path)})) == 1
        assert "upscales videos" in capsys.readouterr().out
    edit(folder / "vae" / "config.json", out_channels=3, patch_size="x")
    assert "says patch_size 'x'. These must be integers above 0" in refused(folder, "vae")


def test_lightx2vs_scales_of_blocks(tmp_path, tensors):
    for dtype in (torch.float8_e4m3fn, torch.int8):
        held = tensors | {f"{Q}.weight": tensors[f"{Q}.weight"].to(dtype), f"{Q}.weight_scale": torch.ones(2, 2)}
        save_file(held, tmp_path / "wan.safetensors")
        says = f"such as {Q}.weight [256, 256] as {str(dtype).removeprefix('torch.')} with the scales [2, 2] as float32"
        assert says in refused(tmp_path / "wan.safetensors")
    save_file({name: x for name, x in held.items() if name.startswith("blocks.")}, tmp_path / "block.safetensors")
    message = refused(tmp_path / "block.safetensors")
    assert "lacks patch_embedding.weight" in message and "It holds only blocks, like LightX2V's files" in message


# JSON


@pytest.mark.parametrize("heads", [0, "12", None, 2.0, 3, -2, [2]])
def test_the_originals_config(tmp_path, tensors, heads):
    folder = formats.original_folder(tmp_path / "wan", tensors)
    edit(folder / "config.json", num_heads=heads)
    says = f"{folder / 'config.json'} says num_heads {heads!r}, which does not divide the 256 channels"
    assert says in refused(folder)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CONFIGS = [
    ("transformer", {"num_layers": "x"}), ("transformer", {"num_layers": None}), ("transformer", {"patch_size": 2}),
    ("transformer", {"num_attention_heads": 0}), ("transformer", {"rope_max_seq_len": "x"}),
    ("transformer", {"in_channels": "x"}), ("transformer", {"image_dim": "x", "added_kv_proj_dim": 96}),
    ("vae", {"z_dim": "x"}), ("vae", {"scale_factor_spatial": 0}), ("vae", {"dim_mult": 3}),
    ("text_encoder", {"num_layers": "x"}), ("text_encoder", {"d_model": None}),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes", CONFIGS, ids=str)
def test_diffusers_configs(checkpoint, tmp_path, kind, changes):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    edit(folder / kind / "config.json", **changes)
    message = refused(folder, kind)
    assert str(folder / kind / "config.json") in message and "again" in message, message


@pytest.mark.parametrize("changes", [{"latents_mean": 5}, {"latents_mean": ["a"] * 16}, {"latents_std": [1.0] * 15}],
                         ids=str)  # fmt: skip
def test_the_latents_format_beside_a_transformer(checkpoint, tmp_path, changes):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    edit(folder / "vae" / "config.json", **changes)
    assert f"{folder / 'vae'}: the normalisation of its latents cannot be used" in refused(folder)


@pytest.mark.parametrize("name, content", [("tokenizer.json", "{}"), ("tokenizer.json", "{"), ("spiece.model", "x")])
def test_tokenizers(checkpoint, tmp_path, name, content):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / name).write_text(content)
    message = refused(folder, "text_encoder")
    assert str(folder / "tokenizer") in message and name in message and "Download it again" in message, message


def test_a_folder_without_a_tokenizers_files(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wan")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert f"{folder / 'tokenizer'} has neither tokenizer.json nor spiece.model" in refused(folder, "text_encoder")


# What is no file of weights


def test_other_files(tmp_path, checkpoint):
    for start, says in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
                        (b"<!DOCTYPE html><html>", "is a web page"), (b"\n <HTML>", "is a web page")):  # fmt: skip
        (tmp_path / "wan.safetensors").write_bytes(start + b" " * 100)
        assert f"{tmp_path / 'wan.safetensors'} {says}" in refused(tmp_path / "wan.safetensors")
    (tmp_path / "wan.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    assert "is a GGUF file of version 50462976; the supported ones are 2 and 3" in refused(tmp_path / "wan.gguf")
    json_file = checkpoint / "transformer" / "config.json"
    assert f"{json_file} is neither a .safetensors nor" in refused(json_file)
    torch.distributed.checkpoint.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert "is neither a .safetensors nor" in refused(tmp_path / "dcp" / ".metadata")


@pytest.mark.parametrize("content, says", [
    (torch.nn.Linear(2, 2), "an object of torch.nn.modules.linear.Linear"), ([torch.zeros(2)], "a list"),
    (torch.zeros(2), "one tensor without a name"),
])  # fmt: skip
def test_what_is_no_state_dict_says_what_it_is(tmp_path, content, says):
    torch.save(content, tmp_path / "model.pth")
    message = refused(tmp_path / "model.pth")
    assert f"holds {says} instead of a dict of tensors. Save the network's state_dict" in message


def test_an_old_protocol_of_pickles(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pth", pickle_protocol=0)
    assert "Save it again with torch.save's default protocol." in refused(tmp_path / "model.pth")


def test_a_file_with_other_heads_is_given_as_its_folder():
    folder = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan" / "transformer"
    message = refused(folder / "diffusion_pytorch_model.safetensors")
    assert "sets attention_head_dim to 48" in message and f"Give its folder: {folder}." in message
