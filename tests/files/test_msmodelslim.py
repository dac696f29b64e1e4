"""Folders that PyPI's msModelSlim wrote, in an environment of its own, load and compute what they stand for.

`--msmodelslim` runs it; the environment takes half a minute to make (`python scripts/lib msmodelslim_env`).
"""

import json
import subprocess
from pathlib import Path

from scripts.lib import msmodelslim_env
import pytest
import random_wan
import tiny_models
import torch
import torch.nn.functional as F
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.models.wan.files.names import to_diffusers_name
from ascend_runtime.components import Components
from safetensors.torch import load_file

WRITER = Path(__file__).resolve().parents[1] / "helpers" / "msmodelslim_writer.py"
HOW = {"recipe": "W8A8_DYNAMIC", "dynamic": "W8A8_DYNAMIC", "static": "W8A8", "timestep": "W8A8_TIMESTEP"}
FORMATS = {"mxfp8": "W8A8_MXFP8", "w4a4": "W4A4_DYNAMIC"}


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    """A file of a transformer by the original's names, 2 layers of 256 channels."""
    if not request.config.getoption("--msmodelslim"):
        pytest.skip("--msmodelslim runs it")
    msmodelslim_env.make()
    if problem := msmodelslim_env.why_not():
        pytest.skip(problem)
    return random_wan.original_transformer(tmp_path_factory.mktemp("float") / "wan.safetensors", seed=11)


def written(source, tmp_path, how):
    """The folder that msModelSlim writes."""
    command = [msmodelslim_env.PYTHON, WRITER, source, tmp_path / "quantized", how]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return tmp_path / "quantized"


@pytest.mark.parametrize("how", FORMATS)
def test_its_own_layers_compute_the_same(source, tmp_path, how):
    """Of the same inputs: msModelSlim's layers round the numbers and multiply them in fp32, as these formats mean. (Its
    layer for W8A8_DYNAMIC has a scale for each channel of the inputs instead.)"""
    folder = written(source, tmp_path, how)
    network, layers = load(folder), load_file(tmp_path / "LAYERS.safetensors")
    off = {}
    for name in (name.removesuffix(".x") for name in layers if name.endswith(".x")):
        layer = network.get_submodule(to_diffusers_name(f"{name}.weight").removesuffix(".weight"))
        with torch.no_grad():
            made, theirs = layer(layers[f"{name}.x"]), layers[f"{name}.y"]
        off[name] = float((made - theirs).abs().max() / theirs.abs().max())
    print(f"\nmsModelSlim {FORMATS[how]}: {max(off.values()):.1e} a layer off its own")
    assert len(off) == 9 and max(off.values()) <= 1e-3


@pytest.mark.parametrize("how", HOW)
def test_what_it_wrote_loads(source, tmp_path, how):
    folder = written(source, tmp_path, how)
    described = json.loads(next(folder.glob("quant_model_description*.json")).read_text())
    assert described["blocks.0.self_attn.q.weight"] == HOW[how] and described["blocks.0.ffn.2.weight"] == "FLOAT"
    network, exact, fly = load(folder), load(source), load(source, quantization="w8a8_dynamic")
    worst = []
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            twin = twin_of(folder, name)
            module.register_forward_hook(
                lambda _, given, out, twin=twin: worst.append((twin(given[0]) - out).abs().max())
            )
    made, expected, own = (velocity(one) for one in (network, exact, fly))
    off = (made - expected).norm() / expected.norm()
    print(f"\nmsModelSlim {HOW[how]}, {how}: {off:.2%} off the float network; {max(worst):.1e} a layer off its twin; "
          f"{(made - own).abs().max():.1e} off ours")  # fmt: skip
    assert len(worst) == 2 * 9 and max(worst) < (1e-2 if how == "static" else 1e-4)
    if how != "static":
        assert torch.equal(made, own)  # ours makes the same integers of the same weights


def load(path, **spec):
    spec = DiffusionModelSpec(path=str(path), dtype="float32", **spec)
    return Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise


def velocity(network):
    generator = torch.Generator().manual_seed(3)
    shapes = (1, 16, 2, 4, 4), (1, 6, random_wan.TEXT_DIM)
    latent, text = (torch.randn(*shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        return tiny_models.velocity(network, latent, torch.tensor([600.0]), text)


def twin_of(folder, layer):
    """A float layer with the weight that the file's integers stand for, of inputs that are rounded as it says."""
    tensors = {to_diffusers_name(name): x for name, x in load_file(next(folder.glob("*.safetensors"))).items()}
    parts = {name.rpartition(".")[2]: x for name, x in tensors.items() if name.rpartition(".")[0] == layer}
    weight, bias = parts["weight"].float() * parts["weight_scale"], parts["bias"].float()

    def dynamic(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / scale).round() * scale, weight, bias)

    def static(x):
        scale, offset = parts["input_scale"], parts["input_offset"]
        return F.linear(((x / scale + offset).round().clamp(-128, 127) - offset) * scale, weight, bias)

    return static if "input_scale" in parts and parts["input_scale"].numel() == 1 else dynamic
