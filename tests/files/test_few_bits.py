"""Weights in ComfyUI's formats of 8 and 4 bits, and in LightX2V's, are read as what they are worth."""

import json
import os

import comfy_formats as formats
import pytest
import torch
from ascend_runtime.checkpoints import pieces
from ascend_runtime.checkpoints.formats.parts import full_slices
from ascend_runtime.checkpoints.opening import open_tensors
from ascend_runtime.checkpoints.reader import AllWeights, check_weights, load_weights, nbytes
from comfy_formats import FORMS, in_form, of_layer, save_form
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

ROWS, WIDTH, SEED = 160, 256, 11  # more rows than a block of scales has
CPU = torch.device("cpu")
PARTS = {
    "all": None,
    "rows": (slice(30, 141), slice(0, WIDTH)),
    "no rows": (slice(ROWS, ROWS), slice(0, WIDTH)),
    "whole groups": (slice(0, ROWS), slice(64, 192)),
    "groups cut apart": (slice(0, ROWS), slice(9, 75)),
}


class Part(AllWeights):
    def __init__(self, part):
        self.part = lambda name, shape: part if name == "weight" else None


def weight():
    print(f"seed {SEED}")
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(SEED))


def loaded(file, part=None, dtype=torch.float32, rows=ROWS):
    network, done = torch.nn.Linear(WIDTH, rows, bias=False, device="meta"), []
    places = check_weights(network, (file,), lambda name, _: name.removeprefix("a."))
    load_weights(network, places, dtype_of=lambda name: dtype, device=CPU, share=Part(part), on_bytes=done.append)
    assert sum(done) == nbytes(places)
    return network.weight.data


@pytest.fixture
def counted(monkeypatch):
    """The bytes of each read."""
    counts = []
    monkeypatch.setattr(os, "preadv", lambda *given, call=os.preadv: counts.append(call(*given)) or counts[-1])
    return counts


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "READ_BYTES", 20_000)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_a_weight_is_what_it_is_worth(tmp_path, small_pieces, form, part):
    worth = save_form(tmp_path / "file", {"a.weight": weight()}, form)["a.weight"]
    cut = PARTS[part] or full_slices(worth.shape)
    assert_close(loaded(tmp_path / "file", PARTS[part]), worth[cut], rtol=0, atol=1e-4)
    assert_close(worth, weight(), rtol=0, atol=1.2)  # coarse, but the weight


@pytest.mark.parametrize("form", FORMS)
def test_marks_in_the_header(tmp_path, form):
    worth = save_form(tmp_path / "file", {"a.weight": weight()}, form, in_header=True)["a.weight"]
    assert_close(loaded(tmp_path / "file"), worth, rtol=0, atol=1e-4)
    made = loaded(tmp_path / "file", dtype=torch.bfloat16)
    assert_close(made, worth.bfloat16(), rtol=0, atol=0.02)


BITS = {"int8 by row": 8, "int8, rotated": 8, "int4": 4, "4-bit levels": 5, "mxfp8": 8.25, "nvfp4": 4.5}


@pytest.mark.parametrize("form", BITS)
def test_a_rank_reads_its_part_only(tmp_path, counted, form):
    """Of the scales of groups, all those of its rows, in whole blocks."""
    save_form(tmp_path / "file", {"a.weight": weight()}, form)
    with open_tensors(tmp_path / "file") as file:
        marks = sum(file.stored_shapes["a.comfy_quant"])
    for part in ((slice(0, 128), slice(0, WIDTH)), (slice(0, 128), slice(64, 128))):
        loaded(tmp_path / "file", part)  # opening reads the marks
        opened = 3 * marks
        counted.clear()
        loaded(tmp_path / "file", part)
        numbers = 128 * (part[1].stop - part[1].start)
        row_scales = 4 * 128 * (form not in ("mxfp8", "nvfp4"))
        group_scales = 128 * WIDTH / {"mxfp8": 32, "nvfp4": 16}.get(form, 1e9)
        exact = {"4-bit levels": numbers * 5 / 8 + 4 * 16, "mxfp8": numbers, "nvfp4": numbers / 2 + 4}
        assert sum(counted) <= exact.get(form, numbers * BITS[form] / 8) + row_scales + group_scales + opened


def test_shapes_are_those_of_the_numbers(tmp_path):
    for form in FORMS:
        save_form(tmp_path / "file", {"a.weight": weight()}, form)
        with open_tensors(tmp_path / "file") as file:
            assert file.shapes["a.weight"] == (ROWS, WIDTH), form


# LightX2V's files have no mark


@pytest.mark.parametrize("form", ["int8 by row", "fp8 by row"])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_a_scale_a_row_without_a_mark(tmp_path, form, scale, part):
    made, _, _ = FORMS[form](weight())
    made["weight_scale"] = made["weight_scale"].to(scale)
    save_file({f"a.{leaf}": x for leaf, x in made.items()}, tmp_path / "file")
    worth = made["weight"].float() * made["weight_scale"].float()
    assert torch.equal(loaded(tmp_path / "file", PARTS[part]), worth[PARTS[part] or full_slices(worth.shape)])


AMBIGUOUS = {
    "blocks of rows": (formats.E4M3, torch.ones(2, 2)),
    "exponents": (formats.E4M3, torch.ones(ROWS, WIDTH // 32, dtype=torch.uint8)),
    "pairs": (torch.uint8, torch.ones(ROWS, WIDTH // 16).to(formats.E4M3)),
    "groups": (torch.int8, torch.ones(ROWS, 4)),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_other_scales_without_a_mark_are_refused(tmp_path, kind):
    dtype, scales = AMBIGUOUS[kind]
    save_file({"a.weight": torch.ones(ROWS, WIDTH).to(dtype), "a.weight_scale": scales}, tmp_path / "file")
    with pytest.raises(ValueError, match="Without a mark, only int8 and fp8 weights with one scale for each row"):
        loaded(tmp_path / "file")


# What cannot be


def change(made, mark, how):
    """A layer's tensors and mark, one of them changed. how: of a leaf, or of the mark."""
    for leaf, value in how.items():
        if leaf == "mark":
            mark = mark | value
        elif value is None:
            del made[leaf]
        else:
            made[leaf] = value(made[leaf])
    return of_layer("a", made, mark)


def holed(value):
    def hole(x):
        x = x.clone()
        x.view(-1)[-1 if x.numel() < 99 else 40] = value
        return x
    return hole


WRONG = {
    "no scale": ("int8 by row", {"weight_scale": None}, "1 without a scale: a.weight"),
    "no scale of the tensor": ("nvfp4", {"weight_scale_2": None}, "1 without a scale: a.weight"),
    "no scales of groups": ("4-bit levels", {"weight_s_rel": None}, "1 without a scale: a.weight"),
    "no exponents": ("mxfp8", {"weight_scale": None}, "1 without a scale: a.weight"),
    "scales of columns": ("int8 by row", {"weight_scale": lambda x: torch.ones(WIDTH)}, "not a scale: a.weight_scale"),
    "whole scales": ("int4", {"weight_scale": lambda x: x.int()}, "not a scale: .*of torch.int32"),
    "scales out of blocks": ("mxfp8", {"weight_scale": lambda x: x[:ROWS, :8].contiguous()},
                             r"not a scale: a.weight_scale \[160, 8\]"),
    "several codebooks": ("4-bit levels", {"weight_codebook": lambda x: x[:8]}, "not a scale: a.weight_codebook"),
    "a dtype": ("nvfp4", {"weight": lambda x: x.view(torch.int8)}, "in another dtype than their mark says: a.weight"),
    "a vector": ("int8 by row", {"weight": lambda x: x[0]}, "in another dtype than their mark says: a.weight"),
    "no weight": ("int8 by row", {"weight": None}, "that are marked, but missing: a.weight"),
    "an odd rotation": ("int8, rotated", {"mark": {"convrot_groupsize": 48}}, "not whole groups of their mark: a.wei"),
    "a wide rotation": ("int8, rotated", {"mark": {"convrot_groupsize": 1024}}, "not whole groups of their mark"),
    "a huge rotation": ("int8, rotated", {"mark": {"convrot_groupsize": 4**30}}, "not whole groups of their mark"),
    "words": ("int4", {"mark": {"convrot_groupsize": "many"}}, "not whole groups of their mark"),
    "a group of none": ("4-bit levels", {"mark": {"group_size": 0}}, "not whole groups of their mark"),
    "an unknown format": ("int8 by row", {"mark": {"format": "fp3"}}, "holds a as fp3. Use the model's"),
    "NaN": ("int8 by row", {"weight_scale": holed(float("nan"))}, "has the scale nan in a.weight_scale"),
    "zero": ("int8, rotated", {"weight_scale": holed(0.0)}, "has the scale 0.0 in a.weight_scale; it must be above"),
    "a NaN of groups": ("nvfp4", {"weight_scale": holed(float("nan"))}, "has the scale nan in a.weight_scale"),
    "a group below 0": ("4-bit levels", {"weight_s_rel": holed(-1.0)}, "has the scale -1.0 in a.weight_s_rel; it must"),
    "a NaN exponent": ("mxfp8", {"weight_scale": holed(255)}, "has the scale nan in a.weight_scale"),
    "an endless scale": ("nvfp4", {"weight_scale_2": lambda x: x * torch.inf}, "has the scale inf in a.weight_scale_2"),
    "NaN weights": ("mxfp8", {"weight": lambda x: (x.float() * torch.nan).to(formats.E4M3)}, "NaN or infinite values"),
    "NaN levels": ("4-bit levels", {"weight_codebook": lambda x: x * torch.nan}, "has NaN or infinite values in a.w"),
    "NaN factors": ("nvfp4 with factors", {"pre_quant_scale": lambda x: x * torch.nan}, "has NaN or infinite values"),
    "a correction": ("4-bit levels", {"mark": {}, "weight_s_rel": lambda x: x}, None),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_broken_files_are_refused_by_name(tmp_path, fault):
    form, how, says = WRONG[fault]
    made, mark, _ = FORMS[form](weight())
    held = change(made, mark, how)
    if says is None:
        held["a.weight_correction"], says = torch.ones(WIDTH // 8, ROWS), "unexpected: weight_correction"
    save_file({name: x.contiguous() for name, x in held.items()}, tmp_path / "file")
    with pytest.raises(ValueError, match=says) as error:
        loaded(tmp_path / "file")
    assert str(tmp_path / "file") in str(error.value)


def test_several_forms_in_one_file(tmp_path):
    tensors = {f"net.{n}.weight": torch.randn(32, WIDTH) for n in range(len(FORMS))} | {"net.0.bias": torch.randn(32)}
    kept, worth = {}, {}
    for number, form in enumerate(FORMS):
        made, own = in_form({name: x for name, x in tensors.items() if name.startswith(f"net.{number}.")}, form)
        kept |= made
        worth |= own
    save_file({name: x.contiguous() for name, x in kept.items()}, tmp_path / "file")
    network = torch.nn.ModuleList(
        torch.nn.Linear(WIDTH, 32, bias=n == 0, device="meta") for n in range(len(FORMS))
    )  # fmt: skip
    places = check_weights(network, (tmp_path / "file",), lambda name, _: name.removeprefix("net."))
    load_weights(network, places, dtype_of=lambda name: torch.float32, device=CPU)
    for name, x in network.state_dict().items():
        assert_close(x, worth[f"net.{name}"], rtol=0, atol=1e-4)


def test_core_comfyuis_own_kernels_say_the_same(tmp_path):
    """Where a newer ComfyUI's requirements are installed: what they write is read as they dequantize it."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    layouts = {
        "int8_tensorwise": (
            kitchen.TensorWiseINT8Layout, {"per_channel": True, "convrot": True}, {"weight_scale": "scale"}
        ),
        "convrot_w4a4": (kitchen.TensorCoreConvRotW4A4Layout, {}, {"weight_scale": "scale"}),
        "asym_w4a8_int8": (kitchen.AsymW4A8Int8Layout, {}, {
            "weight_s_rel": "scale", "weight_s_channel": "s_channel", "weight_codebook": "codebook"}),
        "mxfp8": (kitchen.TensorCoreMXFP8Layout, {}, {"weight_scale": "scale"}),
        "nvfp4": (kitchen.TensorCoreNVFP4Layout, {}, {"weight_scale": "block_scale", "weight_scale_2": "scale"}),
    }  # fmt: skip
    for name, (layout, options, leaves) in layouts.items():
        data, parameters = layout.quantize(weight(), **options)
        made = {"weight": data, **{leaf: getattr(parameters, field) for leaf, field in leaves.items()}}
        save_file(of_layer("a", made, {"format": name, "convrot": True}), tmp_path / "file")
        assert_close(loaded(tmp_path / "file"), layout.dequantize(data, parameters).float(), rtol=0, atol=1e-4)


def test_a_mark_of_another_networks_layer_is_left_alone(tmp_path):
    save_form(tmp_path / "file", {"a.weight": weight()}, "int8 by row")
    strange = {"b.weight": torch.ones(2), "b.comfy_quant": formats.as_bytes({"format": "fp3"})}
    save_file(load_file(tmp_path / "file") | strange, tmp_path / "file")
    network = torch.nn.Linear(WIDTH, ROWS, bias=False, device="meta")
    places = check_weights(network, (tmp_path / "file",),
                           lambda name, _: name.removeprefix("a.") if name.startswith("a.") else None)  # fmt: skip
    assert json.dumps(sorted(places)) == '["weight"]'
