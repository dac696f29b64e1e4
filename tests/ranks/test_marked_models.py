"""Whole models in ComfyUI's formats of few bits: which layers compute in 8 bits, how far that is off, what is said."""

import json
import math

import comfy_formats
import hunyuan_formats
import pytest
import random_hunyuan
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.components import Components, packed
from ascend_runtime.components.text_encoder import TextEncoders
from ascend_runtime.models.shared.quantized.layers import DynamicLinear, MxLinear
from ascend_runtime.ops.blocks.rotation import rotated
from ascend_runtime.planner import models
from ascend_runtime.planner.holding.weights import Share, kept, rules_of
from ascend_runtime.recognition.few_bits import formats_of, with_few_bits
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.specs import TextEncoderSpec
from comfy_formats import FORMS, of_layer, save_form
from original_formats import comfyui_umt5, sentencepiece_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

CPU, SHAPE = torch.device("cpu"), (1, 16, 2, 4, 6)
SAMPLE = ("int8, rotated", "4-bit levels", "nvfp4", "mxfp8")
COMPUTED = [form for form in FORMS if form.startswith(("int", "4-bit"))]


def in_blocks(layer):
    return layer.startswith("blocks.")


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Of a transformer, by the original's names."""
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=8, layers=2))


def load(path, **spec):
    return Components(CPU).get(DiffusionModelSpec(path=str(path), **spec), lambda *_: None)


def velocity(model):
    generator = torch.Generator().manual_seed(3)
    latent, text = (torch.randn(*shape, generator=generator) for shape in (SHAPE, (1, 12, random_wan.TEXT_DIM)))
    with torch.no_grad():
        return tiny_models.velocity(model.high_noise, latent, torch.tensor([600.0]), text)


def off(made, exact):
    return float((made - exact).norm() / exact.norm())


class Forms:
    """A file, and the velocity of what it is worth, by form: each made when it is needed."""

    def __init__(self, folder, tensors):
        self._folder, self._tensors, self._made = folder, tensors, {}

    def __getitem__(self, form):
        if form not in self._made:
            file, twin = (self._folder / f"{len(self._made)}-{name}.safetensors" for name in ("own", "twin"))
            worth = save_form(file, self._tensors, form, in_blocks)
            save_file({name: x.contiguous() for name, x in worth.items()}, twin)
            self._made[form] = file, velocity(load(twin))
        return self._made[form]


@pytest.fixture(scope="module")
def forms(tmp_path_factory, tensors):
    return Forms(tmp_path_factory.mktemp("forms"), tensors)


@pytest.fixture
def sampled(request):
    """Skips a form that is none of the sample."""
    if request.getfixturevalue("form") not in SAMPLE and not request.config.getoption("--all-files"):
        pytest.skip("is one of --all-files")


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_its_dequantized_twin(forms, form):
    file, expected = forms[form]
    model = load(file, packed=False)
    assert off(velocity(model), expected) <= 1e-4
    assert not any(isinstance(layer, DynamicLinear) for layer in model.high_noise.modules())
    said = f"stored as {comfy_formats.name_of(form)}: the weights are read as float32."
    assert model.warnings == ([] if form.startswith("fp8") else [f"The model's weights are {said}"])


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("form", COMPUTED)
def test_products_in_8_bits_are_close_to_it(forms, form):
    """All 20 linear layers of two blocks keep integers; those of rows are mapped from the file."""
    file, expected = forms[form]
    model = load(file)
    layers = {name: layer for name, layer in model.high_noise.named_modules() if isinstance(layer, DynamicLinear)}
    assert len(layers) == 20 and all(layer.weight.dtype == torch.int8 for layer in layers.values())
    assert {layer.rotation for layer in layers.values()} == {0 if "by" in form else comfy_formats.ROTATED}
    error = off(velocity(model), expected)
    print(f"\n{form}: {error:.2%} off its dequantized twin")
    assert 1e-5 < error <= 1e-2
    assert model.warnings == [
        f"The model's weights are stored as {comfy_formats.name_of(form)}: 20 linear layers compute in int8, the other "
        "weights are read as float32."
    ]


def test_lightx2vs_integers_compute_too(tmp_path, tensors):
    kept_ones, worth = comfy_formats.in_form(tensors, "int8 by row", in_blocks)
    held = {name: x for name, x in kept_ones.items() if not name.endswith(".comfy_quant")}
    save_file(held, tmp_path / "rows.safetensors")
    save_file(worth, tmp_path / "twin.safetensors")
    model = load(tmp_path / "rows.safetensors")
    assert sum(isinstance(layer, DynamicLinear) for layer in model.high_noise.modules()) == 20
    assert off(velocity(model), velocity(load(tmp_path / "twin.safetensors"))) <= 1e-2


def test_lightx2vs_folder_of_blocks(tmp_path, tensors):
    made, _ = comfy_formats.in_form(tensors, "fp8 by row", in_blocks)
    made = {name: x for name, x in made.items() if not name.endswith(".comfy_quant")}
    save_file(made, tmp_path / "wan.safetensors")
    folder = tmp_path / "wan"
    folder.mkdir()
    for block in ("blocks.0.", "blocks.1."):
        own = {name: made.pop(name) for name in [*made] if name.startswith(block)}
        save_file(own, folder / f"block_{block[7]}.safetensors")
    save_file(made, folder / "non_block.safetensors")
    with pytest.raises(ValueError, match="no .safetensors.index.json that lists them"):
        load(folder)
    names = {"a": "non_block.safetensors", "b": "block_0.safetensors", "c": "block_1.safetensors"}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert torch.equal(velocity(load(folder)), velocity(load(tmp_path / "wan.safetensors")))
    (folder / "block_1.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks block_1.safetensors"):
        load(folder)


def test_layers_of_full_precision_and_outside_of_blocks_are_dequantized(tmp_path, tensors):
    kept_ones, worth = comfy_formats.in_form(tensors, "int8 by row")
    made, mark, _ = FORMS["int8 by row"](tensors["blocks.0.ffn.0.weight"])
    kept_ones |= of_layer("blocks.0.ffn.0", made, mark | {"full_precision_matrix_mult": True})
    save_file(kept_ones, tmp_path / "wan.safetensors")
    model = load(tmp_path / "wan.safetensors")
    layers = [name for name, layer in model.high_noise.named_modules() if isinstance(layer, DynamicLinear)]
    assert len(layers) == 19 and all(name.startswith("blocks.") for name in layers)
    first = model.high_noise.get_submodule("blocks.0.ffn.net.0.proj")
    assert torch.equal(first.weight, worth["blocks.0.ffn.0.weight"])


def test_a_device_with_products_in_mxfp8_keeps_it(tmp_path, tensors, monkeypatch):
    """A CPU plays it."""
    worth = save_form(tmp_path / "wan.safetensors", tensors, "mxfp8", in_blocks)
    save_file(worth, tmp_path / "twin.safetensors")
    monkeypatch.setattr(packed, "_computes", lambda *_: True)
    model = load(tmp_path / "wan.safetensors")
    layers = [layer for layer in model.high_noise.modules() if isinstance(layer, MxLinear)]
    assert len(layers) == 20 and model.warnings[0].startswith("The model's weights are stored as mxfp8: 20 linear")
    assert torch.equal(layers[0].dequantized(), worth["blocks.0.self_attn.q.weight"])
    assert off(velocity(model), velocity(load(tmp_path / "twin.safetensors"))) <= 0.05


def test_a_rotation_turns_nothing_but_the_axes():
    print("seed 5")
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(8, 64, generator=generator)
    assert_close(rotated(x, 16) @ rotated(weight, 16).t(), x @ weight.t())
    assert_close(rotated(rotated(x, 64), 64), x)
    assert_close(rotated(x, 4), comfy_formats.rotated(x, 4))


def test_the_planner_knows_what_is_kept(forms):
    for form in ("int8, rotated", "nvfp4"):
        model = models.read(DiffusionModelSpec(path=str(forms[form][0])), kind="cpu")
        (network,) = model.experts
        parts = kept(network, rules_of(model, network), model.dtype)
        loaded = load(forms[form][0])
        held = {name: x.nbytes for name, x in loaded.high_noise.state_dict().items()}
        assert {name: one.nbytes for name, one in parts.items()} == held, form
        assert parts["blocks.1.attn1.to_q.weight"].mapped == (form != "nvfp4"), form
    (network,) = models.read(DiffusionModelSpec(path=str(forms["int8, rotated"][0])), kind="npu").experts
    assert set(network.multiples.values()) == {comfy_formats.ROTATED}


def test_groups_that_slices_would_cut_are_dequantized(forms):
    """32 slices of the second linear layer's 512 inputs are groups of 16; 64 are none."""
    found = find_transformer(str(forms["int8, rotated"][0]))
    model = models.read(DiffusionModelSpec(path=str(forms["int8, rotated"][0])), kind="npu")
    names = [name.removesuffix(".weight") for name in model.experts[0].quantized if name.endswith(".weight")]
    for tp, count in ((1, 20), (16, 20), (32, 16), (64, 14)):
        left = with_few_bits(found, names, lambda _: True, tp).quantized.layers
        parts = kept(model.experts[0], rules_of(model, model.experts[0]), "bfloat16", Share(tp))
        assert len(left) == count, (tp, [name for name in names if name not in left])
        for name in names:
            own = parts[f"{name}.weight"]
            assert own.nbytes == math.prod(own.shape) * (1 if name in left else 2), (tp, name)


def test_inspect_names_the_formats(forms, capsys):
    for form in SAMPLE:
        assert inspection.run(type("Arguments", (), {"path": str(forms[form][0])})) == 0
        assert comfy_formats.name_of(form) in capsys.readouterr().out, form


def test_a_conversion_dequantizes(forms, tmp_path):
    for number, form in enumerate(("4-bit levels", "nvfp4")):
        file, expected = forms[form]
        planned = conversion.planned(file, "diffusers", torch.float32, "5GB")
        conversion.convert(planned, tmp_path / str(number), {})
        assert off(velocity(load(tmp_path / str(number))), expected) <= 1e-4, form


def test_the_number_of_each_format(tmp_path, tensors):
    kept_ones, _ = comfy_formats.in_form(tensors, "nvfp4", lambda layer: layer.startswith("blocks.0.ffn"))
    made, mark, _ = FORMS["mxfp8"](tensors["blocks.1.ffn.0.weight"])
    save_file(kept_ones | of_layer("blocks.1.ffn.0", made, mark), tmp_path / "wan.safetensors")
    found = find_transformer(str(tmp_path / "wan.safetensors"))
    assert formats_of(found) == {"nvfp4": 2, "mxfp8": 1}
    assert with_few_bits(found, [], lambda _: True) is found


@pytest.mark.parametrize("form", ["int8, rotated", "nvfp4"])
def test_text_encoders(tmp_path, form):
    encoder = comfyui_umt5(tiny_models.umt5(), sentencepiece_model())
    matrices = {name.removesuffix(".weight") for name, x in encoder.items() if x.ndim == 2 and not x.shape[1] % 16
                and ".layer." in name and "relative" not in name}  # fmt: skip
    worth = save_form(tmp_path / "umt5.safetensors", encoder, form, matrices.__contains__)
    save_file(worth, tmp_path / "twin.safetensors")
    made, twin = (
        Components(CPU).get(TextEncoderSpec(path=str(tmp_path / name)), lambda *_: None)
        for name in ("umt5.safetensors", "twin.safetensors")
    )
    assert matrices and isinstance(made, TextEncoders)
    expected = dict(twin.encoders["text_encoder"].model.named_parameters())
    for name, x in made.encoders["text_encoder"].model.named_parameters():
        assert_close(x, expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["int8, rotated", "nvfp4"])
def test_fused_tensors(tmp_path, form):
    """HunyuanVideo's layers in one tensor are rows and columns of the integers in it."""
    theirs = random_hunyuan.transformer()
    matrices = hunyuan_formats.comfyui_transformer(theirs.state_dict())
    wide = {name.removesuffix(".weight") for name, x in matrices.items() if x.ndim == 2 and "blocks." in name
            and not x.shape[1] % 16 and not x.shape[0] % 16}  # fmt: skip
    worth = save_form(tmp_path / "own.safetensors", matrices, form, wide.__contains__)
    save_file({name: x.contiguous() for name, x in worth.items()}, tmp_path / "twin.safetensors")
    inputs = random_hunyuan.inputs(theirs.config)
    exact, made, dequantized = (
        random_hunyuan.velocity(hunyuan_formats.load(tmp_path / f"{name}.safetensors", **how), inputs).detach()
        for name, how in (("twin", {}), ("own", {}), ("own", {"packed": False}))
    )
    assert off(dequantized, exact) <= 1e-4 and off(made, exact) <= 2e-2
    network = hunyuan_formats.load(tmp_path / "own.safetensors")
    layers = {name for name, layer in network.named_modules() if isinstance(layer, DynamicLinear)}
    print(f"\n{form}: {off(made, exact):.2%} off; {len(layers)} layers compute in 8 bits")
    assert (len(layers) > 20) == (form != "nvfp4")
    if layers:
        assert any("single" in name and name.endswith("to_q") for name in layers), sorted(layers)
