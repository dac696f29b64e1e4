"""HunyuanVideo models in 8 bits, inspected, converted; and what is refused by name."""

import json

import described_folders
import hunyuan_formats as formats
import pytest
import random_hunyuan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.components import Components
from ascend_runtime.models.hunyuan_video.files.configs import rope_axes
from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.models.shared.quantized.static import use_step
from ascend_runtime.recognition.layout import find_vae
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from hunyuan_formats import assert_same, load, parameters
from safetensors.torch import save_file

WIDE = {"num_attention_heads": 2, "attention_head_dim": 32, "rope_axes_dim": rope_axes(32)}  # MXFP8 has groups of 32


@pytest.fixture(scope="module")
def network():
    return random_hunyuan.transformer(**WIDE)


@pytest.fixture(scope="module")
def tensors(network):
    return formats.original_transformer(network.state_dict())


# 8 bits


ALGORITHMS = ("W8A8_DYNAMIC", "W8A8", "W8A8_TIMESTEP", "W8A8_MXFP8", "W4A4_DYNAMIC")
SMOOTHED = (("W8A8_DYNAMIC", True), ("W8A8_TIMESTEP", True))
SHARES = ("proj_out_attn", "proj_out_mlp")


def halves(twin, width):
    """A layer that reads two joined inputs, as the two that read one each: the first `width` inputs, and the others."""
    columns = ("weight", "mul_scale")
    parts = (slice(None, width), slice(width, None))
    return [{name: x[..., part] if name in columns else x for name, x in twin.items()} for part in parts]


@torch.no_grad()
def assert_is_twin(layers, twins, bias, steps):
    """layers: that read one input, or one each of several; their outputs are concatenated, or added."""
    generator = torch.Generator().manual_seed(5)
    for step in steps:
        for layer in layers:
            use_step(layer, step)
        added = len(twins) > 1
        inputs = [torch.randn(2, 3, twin["weight"].shape[1], generator=generator) for twin in twins]
        made = [layer(x) for layer, x in zip(layers, inputs if added else inputs * len(layers))]
        expected = [described_folders.twin_layer(twin, x, torch.zeros(()), step) for twin, x in zip(twins, inputs)]
        made = sum(made) if added else torch.cat(made, -1)
        torch.testing.assert_close(made.double(), sum(expected) + bias.double(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize(("algorithm", "smoothed"), [*((one, False) for one in ALGORITHMS), *SMOOTHED])
def test_a_folder_of_msmodelslim_by_both_systems_names(tmp_path, network, tensors, algorithm, names, smoothed):
    """Each layer computes with what its bytes stand for, modulations too, whose layers are called linear themselves."""
    held = tensors if names == "original" else dict(network.state_dict())
    config = {"_class_name": "HunyuanVideoTransformer3DModel", **network.config} if names == "diffusers" else None
    twins = described_folders.write(tmp_path / "model", held, algorithm, smoothed=smoothed, config=config)
    made = load(tmp_path / "model")
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, QuantizedLinear)}
    fused = {theirs: own for own, theirs in formats.layers_of(network.state_dict(), formats.ORIGINAL)}
    steps = (None, 0, 2) if algorithm == "W8A8_TIMESTEP" else (None,)
    left = dict(layers)
    for name, twin in twins.items():
        own = fused[name] if names == "original" else (name,)
        if own[0].endswith(".proj_out"):
            own, both = [own[0].replace("proj_out", part) for part in SHARES], halves(twin, twin["weight"].shape[0])
        else:
            both = [twin]
        assert_is_twin([left.pop(one) for one in own], both, held[f"{name}.bias"], steps)
    assert not left and len(layers) > 30
    assert inspection.run(type("Arguments", (), {"path": str(tmp_path / "model")})) == 0


def test_quantized_on_the_fly(tmp_path, network, tensors):
    save_file(tensors, tmp_path / "model")
    made = load(tmp_path / "model", quantization="w8a8_dynamic")
    layers = [name for name, layer in made.named_modules() if isinstance(layer, QuantizedLinear)]
    assert {name.rpartition(".")[2] for name in layers} >= {"to_q", "add_k_proj", "to_add_out", "proj_mlp",
                                                            "proj_out_attn"}  # fmt: skip
    inputs = random_hunyuan.inputs(network.config)
    with torch.no_grad():
        ours, theirs = random_hunyuan.velocity(made, inputs), random_hunyuan.diffusers_velocity(network, inputs)
    assert (ours - theirs).norm() / theirs.norm() < 0.05


# Inspected and converted


def inspected(path, capsys):
    status = inspection.run(type("Arguments", (), {"path": str(path)}))
    return status, capsys.readouterr().out


def test_inspect_says_what_a_single_file_leaves_open(tmp_path, tensors, capsys):
    save_file(tensors, tmp_path / "model.safetensors")
    status, said = inspected(tmp_path / "model.safetensors", capsys)
    assert status == 0 and "left open: text to video, or image to video by token replacement (v2)" in said
    for kind, name in zip(random_hunyuan.KINDS, ("HunyuanVideo", "HunyuanVideo-I2V", "HunyuanVideo-I2V")):
        status, said = inspected(random_hunyuan.folder(tmp_path / kind, kind) / "transformer", capsys)
        assert status == 0 and "left open" not in said and f"recognised as {name}" in said
    concat = formats.original_transformer(random_hunyuan.transformer("i2v concat").state_dict())
    save_file(concat, tmp_path / "concat.safetensors")
    assert "left open" not in inspected(tmp_path / "concat.safetensors", capsys)[1]


def converted(source, target, dtype=None):
    plan = conversion.planned(source, "diffusers", dtype, "5GB")
    conversion.convert(plan, target, {})
    return plan


@pytest.mark.parametrize("scales", [False, True], ids=["fp32", "fp8 pair"])
def test_the_originals_folder_becomes_diffusers_pipeline(tmp_path, tensors, network, scales):
    root = formats.original_folder(tmp_path / "ckpts", tensors)
    model = root / "hunyuan-video-t2v-720p"
    vae = random_hunyuan.vae()
    formats.original_vae(model / "vae", vae)
    twin = network
    if scales:
        twin = formats.diffusers_transformer(network, formats.original_fp8(model / "transformers", tensors))
        (model / "transformers" / f"{formats.MASTER}.pt").unlink()
    dtype = torch.float32 if scales else None
    plan = converted(root, tmp_path / "made", dtype)
    assert any("image_condition_type" in text for text in plan.omitted)
    made = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "made" / "transformer")
    assert_same(made.state_dict(), twin.state_dict())
    assert made.config.rope_axes_dim == [*WIDE["rope_axes_dim"]] and made.config.image_condition_type is None
    own = AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "made" / "vae")
    assert_same(own.state_dict(), vae.state_dict())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "made", **dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")))  # fmt: skip
    assert type(pipeline).__name__ == "HunyuanVideoPipeline" and pipeline.scheduler.config.shift == 7.0
    assert_same(parameters(load(tmp_path / "made", dtype="float32")), twin.state_dict())


def test_an_image_to_video_model_becomes_its_pipeline(tmp_path):
    theirs = random_hunyuan.transformer("i2v concat")
    formats.original_vae(tmp_path / "hunyuan-video-i2v-720p" / "vae", random_hunyuan.vae())
    formats.original_folder(tmp_path, formats.original_transformer(theirs.state_dict()), "i2v")
    plan = converted(tmp_path, tmp_path / "made", torch.bfloat16)
    assert not any("image_condition_type" in text for text in plan.omitted)
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoImageToVideoPipeline"
    made = load(tmp_path / "made" / "transformer", dtype="bfloat16")
    assert_same(parameters(made), {name: x.bfloat16() for name, x in theirs.state_dict().items()})


def test_mindspeed_has_no_such_model(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layout does not support a HunyuanVideo transformer. Use --to diffusers"):
        conversion.planned(tmp_path / "model.safetensors", "mindspeed", None, "5GB")


# Refused by name


def tiny(network, **changes):
    """The state of a similar network of diffusers."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "text_embed_dim": 8}
    return network(**{**sizes, "rope_axes_dim": (4, 6, 6), **changes})


SIMILAR = {
    "HunyuanVideo 1.5": lambda: tiny(HunyuanVideo15Transformer3DModel),
    "HunyuanImage": lambda: tiny(HunyuanImageTransformer2DModel, num_single_layers=1, rope_axes_dim=(8, 8),
                                 patch_size=(1, 1)),
    "FramePack": lambda: tiny(HunyuanVideoFramepackTransformer3DModel, num_single_layers=1, has_image_proj=True,
                              has_clean_x_embedder=True),
    "SkyReels": lambda: tiny(HunyuanVideoTransformer3DModel, num_single_layers=1, in_channels=32),
}  # fmt: skip


@pytest.mark.parametrize("similar", SIMILAR)
def test_similar_networks_are_refused_by_name(tmp_path, similar):
    """In diffusers' folder, by the class or the channels in its config; in a single file, by its tensors."""
    SIMILAR[similar]().save_pretrained(tmp_path / "transformer")
    whole = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(whole.read_bytes())
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=rf"{similar}.* not supported"):
            load(path)


NAMES_OF_SIMILAR = {
    "HunyuanVideo 1.5": {"cond_type_embedding.weight": (3, 64), "byt5_in.fc1.weight": (64, 8)},
    "HunyuanImage": {"byt5_in.fc1.weight": (64, 8), "time_r_in.in_layer.weight": (64, 64)},
    "FramePack": {"clean_x_embedder.proj.weight": (64, 16, 1, 2, 2), "image_projection.up.weight": (64, 8)},
    "HunyuanVideo-Avatar": {"audio_adapter_blocks.0.norm1.weight": (64,), "motion_pose.mlp.0.weight": (64, 64)},
    "SkyReels": {"img_in.proj.weight": (64, 32, 1, 2, 2)},
}


@pytest.mark.parametrize("similar", NAMES_OF_SIMILAR)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_similar_networks_by_the_originals_names(tmp_path, tensors, similar, prefix):
    held = tensors | {name: torch.zeros(shape) for name, shape in NAMES_OF_SIMILAR[similar].items()}
    save_file({prefix + name: x.clone() for name, x in held.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors .*{similar}.* not supported. Use .*hunyuan_video_t2v"):
        load(tmp_path / "model.safetensors")


def test_the_vae_of_15_is_refused_by_name(tmp_path):
    vae = AutoencoderKLHunyuanVideo(latent_channels=32, block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    vae.save_pretrained(tmp_path / "vae")
    save_file(dict(vae.state_dict()), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="It is the VAE of HunyuanVideo 1.5, whose latents have 32 channels"):
        find_vae(str(tmp_path / "vae.safetensors"))
    with pytest.raises(ValueError, match="latents of 32 channels, not 16. Use the VAE of HunyuanVideo 1.0"):
        find_vae(str(tmp_path))
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKLHunyuanVideo15"}))
    with pytest.raises(ValueError, match="it must hold a .*AutoencoderKLHunyuanVideo. That is HunyuanVideo 1.5, which"):
        find_vae(str(tmp_path))


BAD_CONFIGS = {
    "num_single_layers.* \\(at most 256\\)": {"num_single_layers": 2**19},
    "num_refiner_layers": {"num_refiner_layers": 10**6},
    "must be integers above 0": {"patch_size_t": 0},
    "says image_condition_type 'video'; it can be one of None, token_replace, latent_concat": {
        "image_condition_type": "video"},
    "with image_condition_type latent_concat it must read 33": {"image_condition_type": "latent_concat"},
    "reads 32 channels": {"in_channels": 32},
    "it must be 3 even numbers whose sum is 32": {"rope_axes_dim": [16, 56, 56]},
    "only rms_norm is supported": {"qk_norm": "layer_norm"},
    "only 4 is supported": {"mlp_ratio": 1e300},
    "a WanTransformer3DModel or a HunyuanVideoTransformer3DModel": {"_class_name": "FluxTransformer2DModel"},
}  # fmt: skip


@pytest.mark.parametrize("says", BAD_CONFIGS)
def test_configs_that_are_refused(tmp_path, network, says):
    network.save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | BAD_CONFIGS[says]))
    with pytest.raises(ValueError, match=says) as error:
        load(tmp_path)
    assert str(tmp_path / "transformer") in str(error.value)


def test_a_config_without_a_class_is_of_the_network_in_the_weights(tmp_path, network):
    network.save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    held = json.loads(config.read_text())
    del held["_class_name"]
    config.write_text(json.dumps(held))
    assert_same(parameters(load(tmp_path)), network.state_dict())


def test_a_single_file_of_a_folder_whose_config_says_more(tmp_path):
    random_hunyuan.transformer("i2v replace").save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="sets image_condition_type to token_replace, .* with None. Give its folder"):
        load(file)
    random_hunyuan.transformer("i2v concat").save_pretrained(tmp_path / "concat")
    load(tmp_path / "concat" / "diffusion_pytorch_model.safetensors")


def test_a_file_of_no_family_is_reported_with_both(tmp_path, tensors):
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    says = (
        r"is not a Wan transformer \(it has neither patch_embedding.weight nor .*\) and not a HunyuanVideo transformer "
        r"\(it has neither .*refiner_blocks.0.norm1.weight nor .*\). Its first tensors are encoder.weight"
    )
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "other.safetensors")
    wan = {"patch_embedding.weight": torch.zeros(8, 16, 1, 2, 2)}
    save_file({f"a.{name}": x.clone() for name, x in tensors.items()} | {f"b.{name}": x for name, x in wan.items()},
              tmp_path / "two.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="two.safetensors holds a Wan transformer and a HunyuanVideo transformer. S"):
        load(tmp_path / "two.safetensors")


# LoRAs that do not fit


def lora_of(tmp_path, network, tensors, held):
    save_file(tensors, tmp_path / "model")
    save_file(held, tmp_path / "lora.safetensors")
    spec = DiffusionModelSpec(path=str(tmp_path / "model"), dtype="float32",
                              loras=(LoraSpec(path=str(tmp_path / "lora.safetensors")),))  # fmt: skip
    return Components(torch.device("cpu")).get(spec, lambda *_: None)


def pair(layer, out, into):
    return {f"diffusion_model.{layer}.lora_A.weight": torch.ones(2, into),
            f"diffusion_model.{layer}.lora_B.weight": torch.ones(out, 2)}  # fmt: skip


def test_loras_of_other_layers_are_left_out_by_name(tmp_path, network, tensors):
    held = pair("double_blocks.0.img_attn_qkv", 192, 64) | pair("double_blocks.7.img_attn_qkv", 192, 64)
    held |= pair("single_blocks.0.linear2", 64, 320) | pair("single_blocks.1.linear2", 64, 300)
    held |= pair("img_in.proj", 64, 33)
    model = lora_of(tmp_path, network, tensors, held)
    (warning,) = model.warnings
    assert "of blocks that this model lacks: diffusion_model.double_blocks.7" in warning
    assert "single_blocks.1.linear2.lora_A.weight [2, 300]" in warning and "img_in.proj" in warning


OTHER_FORMATS = [("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("scalar", "LyCORIS with a trained scalar")]


@pytest.mark.parametrize(("role", "says"), OTHER_FORMATS)
def test_other_formats_of_loras_are_refused_by_name(tmp_path, network, tensors, role, says):
    with pytest.raises(ValueError, match=f"lora.safetensors has an unsupported format. Tensors 1 of {says}"):
        lora_of(tmp_path, network, tensors, {f"lora_unet_double_blocks_0_img_attn_qkv.{role}": torch.ones(2, 2)})


def test_a_lora_of_wan_is_refused(tmp_path, network, tensors):
    with pytest.raises(ValueError, match="is not a LoRA for this model: none of its 2 tensors fits"):
        lora_of(tmp_path, network, tensors, pair("blocks.0.self_attn.q", 64, 64))


def test_rows_left_over_in_a_fused_layer(tmp_path, network, tensors):
    with pytest.raises(ValueError, match="1 with rows that belong to no parameter: .*linear1.lora_B.weight"):
        lora_of(tmp_path, network, tensors, pair("single_blocks.0.linear1", 450, 64))
