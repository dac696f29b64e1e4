"""Tensors that hold several parameters, or one in another order of rows, are read as if each parameter lay there."""

import json
import re
from pathlib import Path

import fused_files
import fused_rank
import gloo_ranks
import pytest
import random_lora
import torch
from ascend_runtime.models.shared.quantized.replacing import quantize, quantized_parameters
from ascend_runtime.checkpoints import pieces
from ascend_runtime.checkpoints.writing import transfer, writers
from ascend_runtime.checkpoints.fused import Target, in_proportion
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.checkpoints.msmodelslim import description_in, read_description
from ascend_runtime.checkpoints.formats.parts import in_ranges, full_slices
from ascend_runtime.checkpoints.reader import AllWeights, check_weights, load_weights, nbytes, read_part
from ascend_runtime.checkpoints.writing.unfinished import unfinished
from ascend_runtime.components.loras import adapter as adapters
from ascend_runtime.components.loras.adapter import Adapter
from ascend_runtime.components.loras.requests import LoraTarget
from ascend_runtime.ops.quantization import quantized_rows
from fused_files import FP8, KINDS, WIDTH, Network, parameters, rename, save, split, tensors
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

RANKS = 4
STRENGTH = 0.5
CPU = torch.device("cpu")
OUT = "net.blocks.0.out.weight"
LINEAR1, SHIFTED = "net.blocks.0.linear1.weight", "net.blocks.0.scale_shift.weight"


class Parts(AllWeights):
    """A share of each parameter, by its shape."""

    def __init__(self, of):
        self.part = lambda name, shape: of(shape)


PARTS = {
    "all": lambda shape: None,
    "rows of both halves": lambda shape: (slice(3, shape[0] - 3), *full_slices(shape)[1:]),
    "the last rows": lambda shape: (slice(shape[0] - 4, shape[0]), *full_slices(shape)[1:]),
    "no rows": lambda shape: (slice(shape[0], shape[0]), *full_slices(shape)[1:]),
    "columns": lambda shape: (*full_slices(shape)[:-1], slice(2, 5)) if len(shape) > 1 else None,
}


def read(file, dtype=torch.float32, part="all", device=CPU):
    """The parameters, by name."""
    network = Network()
    places, done = check_weights(network, (file,), rename, split=split), []
    load_weights(network, places, dtype_of=lambda name: dtype, device=device, share=Parts(PARTS[part]),
                 on_bytes=done.append)  # fmt: skip
    assert sum(done) == nbytes(places)
    return dict(network.named_parameters())


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    assert {name: x.dtype for name, x in made.items()} == {name: x.dtype for name, x in expected.items()}
    assert not [name for name, x in made.items() if not torch.equal(x, expected[name])]


def parts_of(expected, part):
    return {name: x if PARTS[part](x.shape) is None else x[PARTS[part](x.shape)] for name, x in expected.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    for module, name in ((pieces, "READ_BYTES"), (writers, "WRITE_BYTES")):
        monkeypatch.setattr(module, name, 100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_are_plain_slices_of_a_files_tensors(tmp_path, small_pieces, kind, part, dtype):
    held = tensors()
    made = read(save(kind, tmp_path / "file", held), dtype, part)
    assert_same(made, {name: x.to(dtype) for name, x in parts_of(parameters(held), part).items()})


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("part", PARTS)
def test_no_other_byte_is_read(tmp_path, small_pieces, bytes_read, kind, part):
    """What is kept as it lies is mapped: only exchanged halves are read there."""
    held = tensors()
    file = save(kind, tmp_path / "file", held)
    expected = parts_of(parameters(held), part)
    check_weights(Network(), (file,), rename, split=split)
    bytes_read.clear()
    read(file, torch.bfloat16, part)
    assert sum(bytes_read) == sum(4 * x.numel() for x in expected.values())
    bytes_read.clear()
    read(file, torch.float32, part)
    mapped = [name for name in expected if PARTS[part](parameters(held)[name].shape) is None and ".mod." not in name]
    assert sum(bytes_read) == sum(4 * x.numel() for name, x in expected.items() if name not in mapped)


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_order_in_memory(tmp_path, small_pieces, part):
    held = {name: x.t().contiguous().t() for name, x in tensors().items()}
    assert held[LINEAR1].stride() != tensors()[LINEAR1].stride()
    made = read(save("torch", tmp_path / "file", held), part=part)
    assert_same(made, parts_of(parameters(held), part))


def test_a_card_gets_its_rows(tmp_path, small_pieces):
    """The meta device stands for a card."""
    made = read(save("safetensors", tmp_path / "file", tensors()), torch.bfloat16, device=torch.device("meta"))
    assert {name: x.shape for name, x in made.items()} == {name: x.shape for name, x in parameters(tensors()).items()}


@pytest.mark.parametrize("by_row", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("part", PARTS)
def test_weights_in_8_bits_with_their_scales(tmp_path, small_pieces, by_row, part):
    kept, worth = fused_files.in_8_bits(tensors(), by_row)
    for kind in KINDS:
        made = read(save(kind, tmp_path / kind, kept), part=part)
        assert_same(made, parts_of(parameters(worth), part))


def test_scales_of_rows_are_read_with_their_rows(tmp_path, bytes_read):
    kept, _ = fused_files.in_8_bits(tensors(), by_row=True)
    read(save("safetensors", tmp_path / "file", kept), torch.bfloat16, "rows of both halves")
    expected = parts_of(parameters(tensors()), "rows of both halves")
    assert sum(bytes_read) == sum(x.numel() + 4 * len(x) if x.ndim > 1 else 4 * len(x) for x in expected.values())


def test_a_plain_network_with_a_scale_a_row(tmp_path):
    network = torch.nn.Linear(6, 4, bias=False, device="meta")
    weight, scale = torch.randn(4, 6).to(FP8), torch.rand(4, 1) + 1
    marked = {"weight": weight, "scaled_fp8": torch.empty(0, dtype=FP8)}
    save_file({f"a.{name}": x for name, x in marked.items()} | {"a.scale_weight": scale}, tmp_path / "file")
    places = check_weights(network, (tmp_path / "file",), lambda name, _: name.removeprefix("a."))
    load_weights(network, places, dtype_of=lambda name: torch.float32, device=CPU)
    assert torch.equal(network.weight, weight.float() * scale)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_a_row_that_is_none(tmp_path, wrong):
    kept, _ = fused_files.in_8_bits(tensors(), by_row=True)
    name = LINEAR1.replace("weight", "scale_weight")
    kept[name][WIDTH] = wrong
    with pytest.raises(ValueError, match=rf"has the scale {wrong} in {name}; it must be above 0"):
        read(save("safetensors", tmp_path / "file", kept))


def test_layers_that_lie_there_as_integers(tmp_path):
    expected = parameters(fused_files.described(tmp_path, tensors()))
    described = read_description(description_in(tmp_path))
    network = Network()
    layers = described.renamed(lambda name: [one.name for one in split(name, ()) or (Target(name),)])
    quantize(network, layers, "blocks.")
    file, in_8_bits = next(tmp_path.glob("*.safetensors")), quantized_parameters(network)
    places = check_weights(network, (file,), rename, described, split)
    load_weights(network, places, dtype_of=lambda name: in_8_bits.get(name, torch.float32), device=CPU)
    assert_same(dict(network.named_parameters()), expected)


JOINED = ("blocks.{}.out_mixed.weight", "blocks.{}.out_mlp.weight")


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("scales", [None, False, True], ids=["as is", "fp8", "fp8, a scale a row"])
def test_a_conversion_writes_each_parameter(tmp_path, small_pieces, scales, joined):
    held, worth = (tensors(), tensors()) if scales is None else fused_files.in_8_bits(tensors(), scales)
    file = save("safetensors", tmp_path / "file", held)
    places = check_weights(Network(), (file,), rename, split=split)
    moves = {
        name: transfer.Move(name, (place,), torch.empty(place.shape, dtype=torch.bfloat16, device="meta"))
        for name, place in places.items()
    }  # fmt: skip
    expected = {name: x.bfloat16() for name, x in parameters(worth).items()}
    for both in [[name.format(block) for name in JOINED] for block in range(2 * joined)]:
        name, made = both[0].replace("out_mixed", "out"), [moves.pop(one) for one in both]
        moves[name] = transfer.Move(name, tuple(places[one] for one in both), torch.cat([x.made for x in made], 1))
        expected[name] = torch.cat([expected.pop(one) for one in both], 1)
    with unfinished(tmp_path / "made", {"of": "a test"}) as work:
        transfer.fill(transfer.laid_out({Path("out.safetensors"): moves}, work), work, lambda count: None)
        work.finish()
    assert_same(load_file(tmp_path / "made" / "out.safetensors"), expected)


# On ranks


CASES = {
    f"{what}, {share}": {"file": file, "dtype": dtype, "quantized": what == "int8", "lora": lora,
                         "tp": 2 if "slices" in share else 1, "fsdp": "shares" in share}
    for what, file, dtype, lora in (
        ("fp32", "float", "float32", None), ("bf16", "float", "bfloat16", None), ("fp8", "fp8", "float32", None),
        ("fp8 by row", "fp8 by row", "bfloat16", None), ("int8", "float", "float32", None),
        ("lora", "float", "float32", "lora.safetensors"),
    )
    for share in ("shares", "slices", "slices in shares")
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four ranks made of the cases: fused_rank.py's files, next to what they read."""
    folder = tmp_path_factory.mktemp("fused")
    save_file(tensors(), folder / "float")
    for name, by_row in (("fp8", False), ("fp8 by row", True)):
        save_file(fused_files.in_8_bits(tensors(), by_row)[0], folder / name)
    fused_files.save_lora(folder / "lora.safetensors")
    save_file({"x": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))}, folder / "x.safetensors")
    (folder / "cases.json").write_text(json.dumps(CASES))
    gloo_ranks.run("fused_rank.py", folder, RANKS)
    return folder


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def worth(case):
    """The file's tensors as they are to be computed with, whole."""
    file = CASES[case]["file"]
    held = tensors() if file == "float" else fused_files.in_8_bits(tensors(), file == "fp8 by row")[1]
    return {name: x.to(getattr(torch, CASES[case]["dtype"])) for name, x in held.items()}


def with_lora(held, folder):
    added = fused_files.save_lora(folder / "again.safetensors")
    return {name: x + STRENGTH * added[name] for name, x in held.items()}


def share_of(case, name, shape, rank):
    """A rank's part of a parameter, reckoned apart from the code: slices of tp are neighbours, FSDP's the others."""
    part, tp = [slice(0, size) for size in shape], CASES[case]["tp"]
    layer, leaf = name.split(".")[-2:]
    dim = 1 if layer.startswith("out") else 0
    if tp > 1 and layer != "head" and not (layer.startswith("out") and leaf != "weight"):
        width = shape[dim] // tp
        part[dim] = slice(rank % tp * width, (rank % tp + 1) * width)
    if CASES[case]["fsdp"]:
        rows = range(part[0].start, part[0].stop)
        size = -(-len(rows) // (RANKS // tp))
        own = rows[rank // tp * size : (rank // tp + 1) * size]
        part[0] = slice(own.start, own.stop)
    return tuple(part)


def test_each_rank_holds_its_part(folder, case):
    held = worth(case) if not CASES[case]["lora"] else with_lora(worth(case), folder)
    expected = parameters(held)
    if CASES[case]["quantized"]:
        for name in [name for name in expected if is_quantized(case, name)]:
            expected[name], expected[f"{name}_scale"] = quantized_rows(expected[name])
    for rank in range(RANKS):
        made = load_file(folder / f"held-{rank}.safetensors")
        made = {name.removeprefix(f"{case}, "): x for name, x in made.items() if name.startswith(f"{case}, ")}
        made.pop("made", None)
        own = {name: x[share_of(case, name, x.shape, rank)] for name, x in expected.items()}
        if CASES[case]["lora"]:
            assert_close(made, own, atol=1e-6, rtol=1e-6)
        else:
            assert_same(made, own)


def test_each_rank_reads_its_part_and_reports_all(folder, case):
    """A tensor's bytes count once, whatever it holds. Rows that are to be quantized are read whole."""
    file, sizes = load_file(folder / CASES[case]["file"]), {}
    for name, x in parameters(tensors()).items():
        in_8_bits = CASES[case]["file"] != "float" and name.endswith(".weight")
        sizes[name] = (x.shape, 1 if in_8_bits else 4)
    for rank in range(RANKS):
        said, expected = json.loads((folder / f"said-{rank}.json").read_text())[case], 0
        for name, (shape, size) in sizes.items():
            part = share_of(case, name, shape, rank)
            if is_quantized(case, name):
                part = part[0], slice(0, shape[1])
            as_is = CASES[case]["dtype"] == "float32" and size == 4 and not is_quantized(case, name)
            if part == full_slices(shape) and as_is and ".mod." not in name:
                continue  # mapped
            rows = part[0].stop - part[0].start
            expected += size * rows * (1 if len(part) == 1 else part[1].stop - part[1].start)
            if size == 1:
                expected += 4 * (rows if "by row" in case else ranges(name, part))
        assert said["read"] == expected, f"rank {rank}"
        assert said["reported"] == sum(x.nbytes for name, x in file.items() if name.endswith((".weight", ".bias")))


def is_quantized(case, name):
    return CASES[case]["quantized"] and name.startswith("blocks.") and name.endswith(".weight")


def ranges(name, part):
    """In how many pieces a part is read: with each comes the tensor's scale."""
    return len(in_ranges(part, (slice(WIDTH, 2 * WIDTH), slice(0, WIDTH)) if ".mod." in name else None))


@pytest.mark.parametrize("what", ["fp32", "bf16", "fp8", "fp8 by row", "lora"])
def test_what_ranks_make_of_their_shares(folder, what):
    """FSDP gathers what one rank reads: the same bits."""
    case = f"{what}, shares"
    network = Network()
    held = worth(case) if what != "lora" else with_lora(worth(case), folder)
    network.load_state_dict(parameters(held), assign=True)
    with torch.no_grad():
        expected = network(load_file(folder / "x.safetensors")["x"].to(getattr(torch, CASES[case]["dtype"])))
    for rank in range(RANKS):
        made = load_file(folder / f"held-{rank}.safetensors")[f"{case}, made"]
        assert_close(made, expected, atol=1e-4 if what == "lora" else 0, rtol=1e-5 if what == "lora" else 0)


# LoRAs


def lora_of(tmp_path, change=lambda held: None):
    file = tmp_path / "lora.safetensors"
    fused_files.save_lora(file)
    held = load_file(file)
    change(held)
    save_file(held, file)
    shapes = {name: tuple(x.shape) for name, x in parameters(tensors()).items()}
    return read_lora(file, shapes, fused_rank.NAMES)


@pytest.mark.parametrize("part", ["all", "rows of both halves", "columns"])
def test_a_lora_of_fused_layers_changes_each_parameter_by_its_rows(tmp_path, part):
    file, network, share = save("safetensors", tmp_path / "file", tensors()), Network(), Parts(PARTS[part])
    places = check_weights(network, (file,), rename, split=split)
    load_weights(network, places, dtype_of=lambda name: torch.float32, device=CPU, share=share)
    base = {name: x.clone() for name, x in network.named_parameters()}
    lora = lora_of(tmp_path)
    assert lora.changes.keys() == base.keys() and not lora.warning
    adapter, done = Adapter(LoraTarget(places, fused_rank.NAMES), network.get_parameter, share, CPU), []
    adapter.use([(lora, STRENGTH)], done.append)
    assert sum(done) == nbytes(places)
    expected = parts_of(parameters(with_lora(tensors(), tmp_path)), part)
    assert_close(dict(network.named_parameters()), expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(network.blocks[0].to_v.weight, base["blocks.0.to_v.weight"])
    adapter.use([], done.append)
    assert_same(dict(network.named_parameters()), base)


def with_dora(file, held, by):
    """Writes a LoRA of all matrices with DoRA's magnitudes. Returns what the tensors are with it."""
    print("seed 13")
    generator, made = torch.Generator().manual_seed(13), dict(held)
    added = {name: x for name, x in fused_files.save_lora(file).items() if name.endswith(".weight")}
    tensors = {key: x for key, x in load_file(file).items() if not key.endswith("diff_b")}
    for name, change in added.items():
        end, magnitude, adds = random_lora.decomposed(held[name], change, by, generator)
        tensors[f"diffusion_model.{name.removeprefix('net.').removesuffix('weight')}{end}"] = magnitude
        made[name] = held[name] + STRENGTH * adds
    save_file(tensors, file)
    return made


@pytest.mark.parametrize("by", random_lora.MAGNITUDES)
@pytest.mark.parametrize("part", PARTS)
def test_dora_of_fused_layers_has_the_norms_of_whole_rows_or_columns(tmp_path, monkeypatch, part, by):
    """Of which a rank reads only what it does not hold."""
    file, network, share = save("safetensors", tmp_path / "file", tensors()), Network(), Parts(PARTS[part])
    places = check_weights(network, (file,), rename, split=split)
    load_weights(network, places, dtype_of=lambda name: torch.float32, device=CPU, share=share)
    expected = parts_of(parameters(with_dora(tmp_path / "lora", tensors(), by)), part)
    shapes, read = {name: place.shape for name, place in places.items()}, []
    reads = lambda name, place, part, dtype: read.append((name, part)) or read_part(name, place, part, dtype)
    monkeypatch.setattr(adapters, "read_part", reads)
    adapter = Adapter(LoraTarget(places, fused_rank.NAMES), network.get_parameter, share, CPU)
    adapter.use([(read_lora(tmp_path / "lora", shapes, fused_rank.NAMES), STRENGTH)], lambda nbytes: None)
    assert_close(dict(network.named_parameters()), expected, atol=1e-5, rtol=1e-5)
    has_all = part == "columns" if by == "inputs" else part.endswith(("halves", "last rows"))
    if has_all or part in ("all", "no rows"):
        assert not read
    elif by == "inputs":
        own = {name: (PARTS[part](shapes[name]) or full_slices(shapes[name]))[1] for name, _ in read}
        assert all(lies[1] == own[name] for name, lies in read) and read
    else:
        assert all(lies[1] == slice(0, shapes[name][1]) for name, lies in read) and read


def test_a_lora_in_flat_names(tmp_path):
    plain = lora_of(tmp_path).changes

    def flatten(held):
        for key in [*held]:
            layer, dot, role = re.match(r"diffusion_model\.(.*?)(\.)(lora_[AB].weight|alpha|diff_b)$", key).groups()
            held[f"lora_unet_{layer.replace('.', '_')}{dot}{role}"] = held.pop(key)

    flat = lora_of(tmp_path, flatten).changes
    assert flat.keys() == plain.keys()
    assert {name: change.rows for name, change in flat.items()} == {name: x.rows for name, x in plain.items()}


PAIR = "diffusion_model.blocks.0.{}.lora_{}.weight"
BROKEN_LORAS = {
    "rows that are left over": (
        {PAIR.format("linear1", "B"): torch.ones(7 * WIDTH + 1, 2)},
        r"rows that belong to no parameter: diffusion_model.blocks.0.linear1.lora_B.weight \[71, 2\], rows 70 to 70",
    ),
    "a layer, and what it holds": (
        {PAIR.format("to_k", "B"): torch.ones(WIDTH, 2), PAIR.format("to_k", "A"): torch.ones(2, WIDTH)},
        r"1 given twice: .*lora_B.weight \(of blocks.0.to_k.weight\)",
    ),
    "no numbers": (
        {PAIR.format("linear1", "B"): torch.full((7 * WIDTH, 2), torch.nan)},
        "1 with NaN or infinite values: diffusion_model.blocks.0.linear1.lora_B.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN_LORAS)
def test_broken_loras_of_fused_layers(tmp_path, broken):
    changed, says = BROKEN_LORAS[broken]
    with pytest.raises(ValueError, match=says):
        lora_of(tmp_path, lambda held: held.update(changed))


def test_a_lora_of_another_width_is_left_out(tmp_path):
    wider = {PAIR.format("linear1", "B"): torch.ones(14 * WIDTH, 2)}
    lora = lora_of(tmp_path, lambda held: held.update(wider))
    assert "linear1.lora_B.weight [140, 2] and" in lora.warning and "for blocks.0.to_q.weight [10, 10]" in lora.warning
    assert "blocks.0.to_q.weight" not in lora.changes and "blocks.1.to_q.weight" in lora.changes


# What is refused


def changed(**given):
    """The tensors with some replaced (None: left out), by names without "net.blocks.0."."""
    held = tensors() | {f"net.blocks.0.{name.replace('__', '.')}": x for name, x in given.items()}
    return {name: x for name, x in held.items() if x is not None}


BROKEN = {
    "missing": ({"linear1__weight": None}, "4 missing: blocks.0.to_q.weight, blocks.0.to_k.weight, blocks.0.to_v.w"),
    "unexpected": ({"linear9__weight": torch.ones(3, 3)}, "1 unexpected: blocks.0.linear9.weight"),
    "narrow": ({"linear1__weight": torch.ones(70, 9)},
               r"4 of the wrong shape: blocks.0.to_q.weight is \[10, 9\], not \[10, 10\]"),
    "short": ({"linear1__weight": torch.ones(63, 10)}, r"blocks.0.mlp.weight is \[36, 10\], not \[40, 10\]"),
    "left over": ({"linear1__weight": torch.ones(73, 10)},
                  r"1 with rows that belong to no parameter: net.blocks.0.linear1.weight \[73, 10\], rows 70 to 72"),
    "odd": ({"scale_shift__bias": torch.ones(21)}, r"no parameter: net.blocks.0.scale_shift.bias \[21\], rows 20 to 2"),
    "no dims": ({"linear1__bias": torch.ones(())}, r"blocks.0.to_q.bias is \[0\], not \[10\]"),
    "doubled": ({"to_v__weight": torch.ones(10, 10)}, "both hold blocks.0.to_v.weight. Keep one of the two"),
    "not finite": ({"linear1__weight": torch.ones(70, 10).index_fill_(0, torch.tensor(25), torch.nan)},
                   "NaN or infinite values in blocks.0.to_v.weight"),
    "whole numbers": ({"linear1__weight": torch.ones(70, 10, dtype=torch.int32)},
                      "1 that are not floating-point: net.blocks.0.linear1.weight as torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, kind, broken):
    given, says = BROKEN[broken]
    with pytest.raises(ValueError, match=says):
        read(save(kind, tmp_path / "file", changed(**given)))


ROWS = {
    "two take a row": (((0, 10), (9, 20), (20, 30), (30, 70)),
                       "belong to two parameters: {}, row 9 to {}.to_q.weight and {}.to_k.weight"),
    "none takes a row": (((0, 10), (11, 20), (20, 30), (30, 70)), "belong to no parameter: {}, rows 10 to 10"),
    "none takes the last rows": (((0, 10), (10, 20), (20, 30), (30, 60)), "belong to no parameter: {}, rows 60 to 69"),
    "beyond": (((0, 10), (10, 20), (20, 30), (30, 71)),
               "with fewer rows than their parameters have: {}, row 70 of {}.mlp.weight"),
    "all take all": ((None,) * 4, "belong to two parameters: {}, row 0 to {}.mlp.weight and {}.to_k.weight"),
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
def test_each_row_belongs_to_one_parameter(tmp_path, rows):
    cut, says = ROWS[rows]
    says = says.format(f"{LINEAR1} [70, 10]", *["blocks.0"] * 2)

    def wrong(name, shape):
        targets = split(name, shape)
        if f"net.{name}" != LINEAR1:
            return targets
        return tuple(Target(one.name, own and (slice(*own),)) for one, own in zip(targets, cut))

    with pytest.raises(ValueError) as error:
        check_weights(Network(), (save("safetensors", tmp_path / "file", tensors()),), rename, split=wrong)
    assert says in str(error.value), error.value


COLUMNS = {
    "two take a column": ((slice(0, 11), slice(10, 50)),
                          "belong to two parameters: {}, row 0 to {}.out_mixed.weight and {}.out_mlp.weight"),
    "none takes a column": ((slice(0, 10), slice(12, 50)), "columns that belong to no parameter: {}, columns 10 to 11"),
    "none takes the last": ((slice(0, 10), slice(10, 49)), "columns that belong to no parameter: {}, columns 49 to 49"),
    "beyond": ((slice(0, 10), slice(10, 53)),
               "with fewer columns than their parameters have: {}, column 52 of {}.out_mlp.weight"),
    "all take all": ((None, None), "belong to two parameters: {}, row 0 to {}.out_mixed.weight and {}.out_mlp.weight"),
}  # fmt: skip


@pytest.mark.parametrize("columns", COLUMNS)
def test_each_column_belongs_to_one_parameter(tmp_path, columns):
    cut, says = COLUMNS[columns]
    says = says.format(f"{OUT} [10, 50]", *["blocks.0"] * 2)

    def wrong(name, shape):
        targets = split(name, shape)
        if f"net.{name}" != OUT:
            return targets
        return tuple(Target(one.name, columns=own) for one, own in zip(targets, cut))

    with pytest.raises(ValueError) as error:
        check_weights(Network(), (save("safetensors", tmp_path / "file", tensors()),), rename, split=wrong)
    assert says in str(error.value), error.value


@pytest.mark.parametrize("shape", [(), (10,), (10, 52), (10, 50, 1), (9, 50)], ids=str)
def test_a_layer_of_joined_inputs_of_another_shape(tmp_path, shape):
    with pytest.raises(ValueError, match="no parameter: net.blocks.0.out.weight|blocks.0.out_m.* is .*, not"):
        read(save("safetensors", tmp_path / "file", changed(out__weight=torch.ones(shape))))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_may_lie_there_as_a_convolution_of_size_1(tmp_path, small_pieces, device, dtype):
    network = torch.nn.Linear(6, 4, device="meta")
    weight = torch.randn(4, 6)
    save_file({"weight": weight.view(4, 6, 1, 1, 1), "bias": torch.zeros(4)}, tmp_path / "file")

    def flat(name, _):
        return (Target(name, flat=True),)

    places = check_weights(network, (tmp_path / "file",), split=flat)
    load_weights(network, places, dtype_of=lambda name: dtype, device=torch.device(device))
    assert network.weight.shape == (4, 6)
    assert device == "meta" or torch.equal(network.weight, weight.to(dtype))
    save_file({"weight": torch.ones(4, 6, 1, 1, 3), "bias": torch.zeros(4)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"weight is \[4, 6, 1, 1, 3\], not \[4, 6\]"):
        check_weights(torch.nn.Linear(6, 4, device="meta"), (tmp_path / "file",), split=flat)


def test_two_shards_that_hold_the_same(tmp_path):
    held = tensors()
    files = save("safetensors", tmp_path / "a", held), save("safetensors", tmp_path / "b", {LINEAR1: held[LINEAR1]})
    with pytest.raises(ValueError, match="b and .*a both hold blocks.0.to_q.weight"):
        check_weights(Network(), files, rename, split=split)


def test_proportions_name_the_same_whatever_the_shape():
    for shape in ((), (0,), (3, 4), (70, 10)):
        assert [one.name for one in in_proportion({"a": 3, "b": 4}, shape)] == ["a", "b"]
    assert [one.rows for one in in_proportion({"a": 3, "b": 4}, (70, 10))] == [(slice(0, 30),), (slice(30, 70),)]
