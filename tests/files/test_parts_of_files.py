"""A network among others in one file, behind a prefix, or in shards without a config: found by its tensors' names."""

import original_formats as formats
import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.components import Components
from ascend_runtime.components.text_encoder import TextEncoders
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

SPECS = {"transformer": DiffusionModelSpec, "text_encoder": TextEncoderSpec, "vae": VaeSpec}
PREFIXES = ("model.", "net.", "model.model.", "diffusion_model.", "transformer.", "pipe.dit.", "_orig_mod.",
            "generator_ema.model.", "generator.model._fsdp_wrapped_module.")  # fmt: skip


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Of a transformer, by the original's names."""
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=8, layers=2))


@pytest.fixture(scope="module")
def vae():
    return formats.original_vae(tiny_models.randomise(AutoencoderKLWan(base_dim=4), 5))


@pytest.fixture(scope="module")
def encoder():
    return formats.comfyui_umt5(tiny_models.umt5(), formats.sentencepiece_model())


def prefixed(prefix, tensors):
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def load(path, kind="transformer"):
    """The parameters of a network, by name; a text encoder's tokens of a text too."""
    loaded = Components(torch.device("cpu")).get(SPECS[kind](path=str(path)), lambda *_: None)
    if isinstance(loaded, TextEncoders):
        encoder = loaded.encoders["text_encoder"]
        tokens = encoder.tokenizer("a red circle", truncation=False).input_ids
        return {**dict(encoder.model.named_parameters()), "tokens": tokens}
    return dict((loaded.high_noise if kind == "transformer" else loaded.network).named_parameters())


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    different = [name for name, tensor in made.items() if not torch.equal(tensor, expected[name])]
    assert not different


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tensors, vae, encoder):
    """What files of one network each give."""
    folder = tmp_path_factory.mktemp("plain")
    for kind, held in (("transformer", tensors), ("vae", vae), ("text_encoder", encoder)):
        save_file(held, folder / kind)
    return {kind: load(folder / kind, kind) for kind in SPECS}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_transformer_behind_a_prefix(tmp_path, tensors, expected, prefix):
    torch.save(prefixed(prefix, tensors), tmp_path / "wan.pt")
    assert_same(load(tmp_path / "wan.pt"), expected["transformer"])


def test_wrappers_of_torch_within_names(tmp_path, tensors, expected):
    held = {name.replace("self_attn.", "_fsdp_wrapped_module.self_attn._orig_mod."): x for name, x in tensors.items()}
    torch.save({"generator": held}, tmp_path / "wan.pt")
    assert_same(load(tmp_path / "wan.pt"), expected["transformer"])


@pytest.mark.parametrize("prefix", ["model.", "vae.", "first_stage_model."])
def test_a_vae_behind_a_prefix(tmp_path, vae, expected, prefix):
    save_file(prefixed(prefix, vae), tmp_path / "vae.safetensors")
    assert_same(load(tmp_path / "vae.safetensors", "vae"), expected["vae"])


def test_several_networks_of_one_kind_are_named(tmp_path, tensors):
    torch.save(prefixed("one.", tensors) | prefixed("other.", tensors), tmp_path / "wan.pt")
    with pytest.raises(ValueError, match="wan.pt holds 2 networks, each a Wan transformer: one., other."):
        load(tmp_path / "wan.pt")


@pytest.mark.parametrize("used, others", [
    ("generator_ema.model.", ("generator.model.", "critic.model.")), ("net_ema.", ("net.",)),
    ("ema.", ("model.", "fake_score.")), ("generator.", ("critic.", "real_score.")),
])  # fmt: skip
def test_of_what_training_saves_the_network_that_makes_videos_is_used(tmp_path, tensors, expected, used, others):
    held = prefixed(used, tensors)
    for prefix in others:
        held |= prefixed(prefix, {name: x + 1 for name, x in tensors.items()})
    torch.save(held, tmp_path / "wan.pt")
    assert_same(load(tmp_path / "wan.pt"), expected["transformer"])


def test_a_stranger_behind_another_prefix_is_not_passed_over(tmp_path, tensors):
    save_file(prefixed("net.", tensors) | {"stranger.weight": torch.zeros(2)}, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match="1 unexpected: stranger.weight"):
        load(tmp_path / "wan.safetensors")


@pytest.fixture(params=["fp32", "fp8_scaled"])
def whole_model(request, tmp_path, tensors, vae, encoder):
    """(a file as ComfyUI saves whole models, what its transformer's tensors are worth)."""
    others = prefixed("vae.", vae)
    for name, x in encoder.items():
        others["text_encoders.umt5xxl." + ("" if name == "spiece_model" else "transformer.") + name] = x
    file, own = tmp_path / "all.safetensors", tensors
    if request.param == "fp32":
        save_file(prefixed("model.diffusion_model.", tensors) | others, file)
    else:
        kept, scales = formats.in_8_bits(tensors)
        formats.save_old_mark(file, kept, scales, prefix="model.diffusion_model.")
        others = {name: x.to(formats.FP8) if x.ndim == 5 else x for name, x in others.items()}  # without a scale
        save_file(load_file(file) | others, file)
        own = formats.dequantized(kept, scales)
    return file, own


def test_each_network_of_a_whole_models_file(tmp_path, whole_model, expected, capsys):
    file, own = whole_model
    save_file(own, tmp_path / "own.safetensors")
    assert_same(load(file), load(tmp_path / "own.safetensors"))
    assert_same(load(file, "text_encoder"), expected["text_encoder"])
    made = load(file, "vae")
    assert made.keys() == expected["vae"].keys()
    assert inspection.run(type("Arguments", (), {"path": str(file)})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["transformer", "text_encoder", "vae"]
    assert all(line.endswith(", complete") for line in lines[1:4])


def test_a_whole_models_file_is_converted(tmp_path, whole_model, expected):
    file, own = whole_model
    save_file(own, tmp_path / "own.safetensors")
    conversion.convert(conversion.planned(file, "diffusers", torch.bfloat16, "5GB"), tmp_path / "made", {})
    own = {name: x.bfloat16() for name, x in load(tmp_path / "own.safetensors").items()}
    made = {name: x.bfloat16() for name, x in load(tmp_path / "made").items()}
    assert_same(made, own)
    assert torch.equal(load(tmp_path / "made", "text_encoder")["tokens"], expected["text_encoder"]["tokens"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_header_that_names_layers_without_the_prefix(tmp_path, tensors, prefix):
    kept, scales = formats.in_8_bits(tensors)
    formats.save_new_mark(tmp_path / "new", kept, scales)
    held, header = load_file(tmp_path / "new"), formats.header_of(tmp_path / "new")
    save_file(prefixed(prefix, held), tmp_path / "wan.safetensors", metadata=header)
    save_file(formats.dequantized(kept, scales), tmp_path / "own.safetensors")
    assert_same(load(tmp_path / "wan.safetensors"), load(tmp_path / "own.safetensors"))


# Shards


def shards(folder, tensors, numbers=(1, 2), name="diffusion_pytorch_model"):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        held = {key: x for place, (key, x) in enumerate(sorted(tensors.items())) if place % 2 == number - 1}
        save_file(held, folder / f"{name}-{number:05}-of-00002.safetensors")
    return folder


def test_shards_without_a_config_are_one_network(tmp_path, tensors, expected):
    folder = shards(tmp_path / "wan", tensors)
    assert_same(load(folder), expected["transformer"])
    (tmp_path / "model").mkdir()
    folder.rename(tmp_path / "model" / "high_noise_model")
    shards(tmp_path / "model" / "low_noise_model", tensors)
    loaded = Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(tmp_path / "model")), lambda *_: None)
    assert len(loaded.experts) == 2
    assert inspection.run(type("Arguments", (), {"path": str(tmp_path / "model" / "high_noise_model")})) == 0


def test_one_shard_says_that_it_is_one(tmp_path, tensors, checkpoint):
    folder = shards(tmp_path / "wan", tensors, numbers=(2,))
    file = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    says = f"By its name it is shard 2 of 2 of one network. Give its folder, {folder}, which must contain all 2."
    with pytest.raises(ValueError) as error:
        load(file)
    assert says in str(error.value) and "Download it again" not in str(error.value)
    with pytest.raises(ValueError, match="wan lacks shard 1 of 2. Download the missing shards"):
        load(folder)
    whole = {name: x for name, x in tensors.items() if name != "blocks.1.ffn.2.weight"}
    save_file(whole, file)  # what a transformer is known by is there, a block's layer is not
    with pytest.raises(ValueError) as error:
        load(file)
    assert "1 missing: blocks.1.ffn.net.2.weight" in str(error.value) and says in str(error.value)


def test_shards_of_two_networks_in_one_folder(tmp_path, tensors):
    shards(tmp_path / "wan", tensors)
    shards(tmp_path / "wan", tensors, name="low")
    with pytest.raises(ValueError, match="shards of several networks: diffusion_pytorch_model-...-of-00002.*, low-"):
        load(tmp_path / "wan")
