"""LoRA files in LyCORIS's formats: they make what core ComfyUI makes of them; what core cannot read, by its formula."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import hunyuan_formats
import pytest
import random_hunyuan
import random_lora
import random_lycoris
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec
from ascend_runtime.checkpoints.opening import open_tensors
from ascend_runtime.components import Components
from ascend_runtime.models.family import LoraNames
from ascend_runtime.recognition.lora.files import read_lora
from safetensors.torch import load_file, save_file
from scripts.lib.comfy_server import COMFYUI
from torch.testing import assert_close

HELPERS = Path(__file__).parents[1] / "helpers"
STRENGTH = 0.7
SHAPES = {"matrix": (24, 32), "2d": (24, 32, 2, 2), "3d": (24, 32, 1, 2, 2)}  # of a layer's weight
# Core has no Tucker form of a weight with 5 dims, and aligns the factors' last dims where LyCORIS aligns the first. Its
# LoKr in Tucker form fails in torch.kron, which takes no tensors that einsum has permuted.
NOT_IN_CORE = {(form, "3d") for form in random_lycoris.TUCKER} | {("lokr tucker", "2d")}
LAYERS = [(form, kind) for form in random_lycoris.MATRICES for kind in SHAPES]
LAYERS += [(form, kind) for form in random_lycoris.TUCKER for kind in ("2d", "3d")]
OF_A_LAYER = LoraNames(lambda known: {"layer": "layer"})


def models(folder):
    """Transformers in ComfyUI's files, small ones that core can load."""
    state = random_hunyuan.transformer("t2v", **random_hunyuan.AS_CORE).state_dict()
    save_file(hunyuan_formats.comfyui_transformer(state), folder / "hunyuan_base.safetensors")
    random_wan.original_transformer(folder / "wan_base.safetensors")
    return {"wan": "wan_base.safetensors", "hunyuan": "hunyuan_base.safetensors"}


def of_all_layers(file, lora):
    """Writes a LoRA in all formats for all weights of a transformer, and differences of its other parameters. Returns
    the differences of modulations, which core leaves out."""
    generator, made, left = torch.Generator().manual_seed(4), {}, {}
    numbers = {}
    for name, tensor in load_file(file).items():
        key, shape = f"diffusion_model.{name.removesuffix('.weight')}", tuple(tensor.shape)
        if name.endswith(".weight") and tensor.ndim > 1:
            kind = "convolution" if tensor.ndim > 2 else "matrix"
            numbers[kind] = number = numbers.get(kind, 0) + 1
            form = random_lycoris.MATRICES[number % len(random_lycoris.MATRICES)]
            alpha = None if number % 3 == 0 else random_lycoris.ALPHA
            tensors, _ = random_lycoris.tensors(form, shape, generator, 0.05, alpha)
            made |= {f"{key}.{end}": each for end, each in tensors.items()}
            continue
        difference = 0.1 * torch.randn(shape, generator=generator)
        end = "diff_b" if name.endswith(".bias") else "w_norm" if "norm" in name and name.endswith("weight") else "diff"
        made[f"{key.removesuffix('.bias')}.{end}"] = difference
        if name.endswith("modulation"):
            left[name] = difference
    save_file(made, lora)
    return left


def decomposed(file, lora):
    """Writes a LoRA with DoRA's magnitudes of outputs or inputs for all matrices and convolutions of a transformer."""
    generator, made = torch.Generator().manual_seed(6), {}
    kinds = itertools.cycle(itertools.product(("outputs", "inputs"), random_lycoris.MATRICES[:-1]))
    for name, tensor in load_file(file).items():
        if name.endswith(".weight") and tensor.ndim > 1:
            key, (by, form) = f"diffusion_model.{name.removesuffix('.weight')}", next(kinds)
            tensors, added = random_lycoris.tensors(form, tuple(tensor.shape), generator, 0.02)
            made |= {f"{key}.{end}": each for end, each in tensors.items()}
            end, made[f"{key}.dora_scale"], _ = random_lora.decomposed(tensor.float(), added, by, generator)
            assert end == "dora_scale"
    save_file(made, lora)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The folder of all files, in which core's results are, and the differences of modulations by model."""
    folder, cases, left = tmp_path_factory.mktemp("lycoris"), {"models": {}, "layers": {}}, {}
    for case, file in models(folder).items():
        left[case] = of_all_layers(folder / file, folder / f"{case}_lora.safetensors")
        cases["models"][case] = {"file": file, "loras": [[f"{case}_lora.safetensors", STRENGTH]]}
        decomposed(folder / file, folder / f"{case}_dora.safetensors")
        stack = [[f"{case}_dora.safetensors", STRENGTH], [f"{case}_lora.safetensors", 0.4],
                 [f"{case}_dora.safetensors", -0.3]]  # fmt: skip
        cases["models"][f"{case} dora"] = {"file": file, "loras": stack}
    for seed, (form, kind) in enumerate(LAYERS):
        tensors, added = random_lycoris.tensors(form, SHAPES[kind], torch.Generator().manual_seed(seed))
        file = f"{form} {kind}.safetensors".replace(" ", "_")
        save_file({f"layer.{end}": tensor for end, tensor in tensors.items()}, folder / file)
        save_file({"added": added.contiguous()}, folder / f"added_{file}")
        if (form, kind) not in NOT_IN_CORE:
            cases["layers"][file] = {"file": file, "shape": SHAPES[kind], "strength": STRENGTH}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, f"{HELPERS}/core_loras.py", str(COMFYUI), str(folder)]
    subprocess.run(command, check=True, timeout=120)
    return folder, left


def weights_of(file, *loras):
    model = DiffusionModelSpec(path=str(file), dtype="float32", loras=loras)
    return dict(Components(torch.device("cpu")).get(model, lambda *_: None).high_noise.named_parameters())


@pytest.mark.parametrize("case", ["wan", "hunyuan"])
def test_a_file_with_all_formats_makes_cores_weights(core, tmp_path, case):
    """Except for modulations of blocks, which core does not change."""
    folder, left = core
    expected = load_file(folder / f"{case}.safetensors")
    assert bool(left[case]) == (case == "wan")
    for name, difference in left[case].items():
        expected[name] = expected[name] + STRENGTH * difference
    save_file(expected, tmp_path / "merged.safetensors")
    lora = LoraSpec(path=str(folder / f"{case}_lora.safetensors"), strength=STRENGTH)
    made, merged = weights_of(folder / f"{case}_base.safetensors", lora), weights_of(tmp_path / "merged.safetensors")
    assert made.keys() == merged.keys()
    for name, weight in made.items():
        assert_close(weight.data, merged[name].data, atol=2e-6, rtol=1e-5, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize("case", ["wan", "hunyuan"])
def test_loras_of_dora_make_cores_weights_one_after_the_other(core, tmp_path, case):
    """Of pairs, LoHa and LoKr, by outputs and by inputs, also of layers that the model holds as several. The order
    counts, as each norm is that of the weight with the changes before."""
    folder, left = core
    expected = load_file(folder / f"{case} dora.safetensors")
    for name, difference in left[case].items():
        expected[name] = expected[name] + 0.4 * difference
    save_file(expected, tmp_path / "merged.safetensors")
    stack = [LoraSpec(path=str(folder / f"{case}_{kind}.safetensors"), strength=strength)
             for kind, strength in (("dora", STRENGTH), ("lora", 0.4), ("dora", -0.3))]  # fmt: skip
    made, merged = weights_of(folder / f"{case}_base.safetensors", *stack), weights_of(tmp_path / "merged.safetensors")
    other = weights_of(folder / f"{case}_base.safetensors", *reversed(stack))
    for name, weight in made.items():
        assert_close(weight.data, merged[name].data, atol=1e-5, rtol=1e-5, msg=lambda text, of=name: f"{of}: {text}")
    assert any((weight.data - other[name].data).abs().max() > 1e-2 for name, weight in made.items())


def test_norms_have_another_name_in_newer_cores(core, tmp_path):
    """HunyuanVideo's, in files and in LoRAs."""
    file = core[0] / "hunyuan_base.safetensors"
    renamed = {re.sub(r"_norm\.scale$", "_norm.weight", name): x for name, x in load_file(file).items()}
    norms = [name.removesuffix(".weight") for name in renamed if name.endswith("_norm.weight")]
    assert len(norms) == 12
    save_file(renamed, tmp_path / "renamed.safetensors")
    for end, name in (("", "newer"), (".scale", "older")):
        tensors = {f"diffusion_model.{norm}{end}.diff": torch.ones(128) for norm in norms}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    loras = [LoraSpec(path=str(tmp_path / f"{name}.safetensors")) for name in ("newer", "older")]
    base, changed = weights_of(file), weights_of(tmp_path / "renamed.safetensors", *loras)
    assert base.keys() == changed.keys()
    for name, weight in changed.items():
        assert_close(weight.data, base[name].data + (2 if "attn.norm_" in name else 0))


def change_in(path, shape):
    (change,) = read_lora(path, {"layer.weight": shape}, OF_A_LAYER).changes.values()
    return change


@pytest.mark.parametrize(("form", "kind"), LAYERS, ids=lambda x: x)
def test_each_format_of_a_layer(core, rng, form, kind):
    """As core where core has it, and by LyCORIS's formula; of any part of a weight."""
    folder, shape = core[0], SHAPES[kind]
    file = f"{form} {kind}.safetensors".replace(" ", "_")
    change, added = change_in(folder / file, shape), load_file(folder / f"added_{file}")["added"]
    with open_tensors(folder / file) as opened:
        made = torch.zeros(shape)
        change.add_to(made, opened, tuple(slice(0, size) for size in shape), shape, STRENGTH)
        assert_close(made, STRENGTH * added, atol=1e-5, rtol=1e-5)
        if (form, kind) not in NOT_IN_CORE:
            assert_close(made, load_file(folder / "layers.safetensors")[file], atol=1e-6, rtol=1e-5)
        for _ in range(5):
            rows, columns = (sorted(rng.choices(range(size + 1), k=2)) for size in shape[:2])
            part = (slice(*rows), slice(*columns), *(slice(0, size) for size in shape[2:]))
            piece = torch.zeros_like(made[part])
            change.add_to(piece, opened, part, shape, STRENGTH)
            assert_close(piece, made[part], atol=1e-6, rtol=1e-5)


BROKEN = {  # the ends of keys that are removed, or get another shape
    "a LoHa without a factor": ("loha", {"hada_w2_b": None}),
    "a LoHa whose ranks differ": ("loha", {"hada_w1_b": (2, 32)}),
    "a LoHa whose halves differ": ("loha", {"hada_w2_a": (25, 3)}),
    "a LoHa with one core": ("loha", {"hada_t1": (3, 3)}),
    "a LoKr without a factor": ("lokr whole", {"lokr_w2": None}),
    "a LoKr with a factor twice": ("lokr small", {"lokr_w1": (2, 4)}),
    "a LoKr of a vector": ("lokr whole", {"lokr_w1": (2,)}),
    "a LoKr whose ranks differ": ("lokr large", {"lokr_w2_b": (2, 8)}),
    "a LoKr with a core of a whole factor": ("lokr whole", {"lokr_t2": (3, 3)}),
    "a pair whose core has another rank": ("pair", {"lora_mid.weight": (2, 2, 1)}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_factors_that_make_no_change_are_named(tmp_path, name):
    form, changes = BROKEN[name]
    tensors, _ = random_lycoris.tensors(form, SHAPES["matrix"], torch.Generator().manual_seed(1))
    for end, shape in changes.items():
        tensors.pop(end, None)
        if shape is not None:
            tensors[end] = torch.ones(shape)
    save_file({f"layer.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="that make no complete change: .*layer"):
        read_lora(tmp_path / "lora.safetensors", {"layer.weight": SHAPES["matrix"]}, OF_A_LAYER)


@pytest.mark.parametrize("form", random_lycoris.MATRICES)
def test_a_change_of_another_size_is_left_out_if_so_asked(tmp_path, form):
    """With a layer that fits, always; without one, the file is refused, unless misfits are skipped."""
    generator, shape = torch.Generator().manual_seed(2), SHAPES["matrix"]
    (fits, _), (other, _) = (random_lycoris.tensors(form, size, generator) for size in (shape, (24, 64)))
    names = LoraNames(lambda known: {"layer": "layer", "other": "other"})
    shapes = {"layer.weight": shape, "other.weight": shape}

    def read(*layers, misfits):
        tensors = {f"{layer}.{end}": x for layer, ends in layers for end, x in ends.items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        return read_lora(tmp_path / "lora.safetensors", shapes, names, misfits=misfits)

    for misfits in ("refuse", "skip"):
        made = read(("layer", fits), ("other", other), misfits=misfits)
        assert made.changes.keys() == {"layer.weight"} and "1 of the wrong shape: other." in made.warning
    with pytest.raises(ValueError, match="none of its . tensors fits"):
        read(("other", other), misfits="refuse")
    made = read(("other", other), misfits="skip")
    assert made.changes == {} and "changes nothing, as none of its tensors fits: 1 of the wrong shape" in made.warning


def test_tensors_that_contradict_each_other_are_left_out_if_so_asked(tmp_path):
    pair = {"layer.lora_up.weight": torch.ones(24, 3), "layer.lora_down.weight": torch.ones(4, 32)}
    save_file(pair | {"other.diff": torch.ones(24)}, tmp_path / "lora.safetensors")
    names = LoraNames(lambda known: {"layer": "layer", "other": "other"})
    shapes = {"layer.weight": (24, 32), "other.weight": (24,)}
    with pytest.raises(ValueError, match="that make no complete change: layer.lora_up.weight"):
        read_lora(tmp_path / "lora.safetensors", shapes, names)
    made = read_lora(tmp_path / "lora.safetensors", shapes, names, misfits="skip")
    assert made.changes.keys() == {"other.weight"}
    assert r"that make no complete change: layer.lora_up.weight [24, 3] and layer.lora_down" in made.warning
