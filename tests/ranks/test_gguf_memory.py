"""What a model in a GGUF file takes of a device is what the planner predicts, by which it chooses how it is kept."""

import gguf
import gguf_files
import numpy as np
import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, SampleSpec
from ascend_runtime.components import Components
from ascend_runtime.planner import choice, memory, models, rates
from ascend_runtime.planner.choosing.arrangements import Fixed
from ascend_runtime.planner.facts import Arrangement, Machine, Video
from ascend_runtime.planner.holding.weights import Share, kept, on_device, rules_of
from ascend_runtime.specs import Plan
from benchmarks.memory import GIVES_BACK
from memory_jobs import MB, taken

MOST = 1.15  # of what is taken, as of all predictions
WIDTHS = {"narrow": (512, 1024), "14B": (5120, 13824)}  # (channels, inner width of the feed-forward)
TEXT_TOKENS = 16


def wan(file, width, ffn, monkeypatch, kind="Q4_K"):
    """A Wan of two layers, whose matrices are written without being quantized, as random blocks."""
    monkeypatch.setattr(random_wan, "FFN", ffn)
    shapes = random_wan._original_shapes(width, 2, 16, 16)
    generator, of = np.random.default_rng(7), gguf_files.as_city96(kind)
    writer = gguf.GGUFWriter(file, "wan")
    some = gguf_files.random_blocks(kind, 64, width, generator, 0.5 / np.sqrt(width)).reshape(-1)
    for name, shape in shapes.items():
        if of(name, shape) == "F32":
            data = 0.02 * generator.standard_normal(shape, np.float32) + (1 if name.endswith("norm.weight") else 0)
        else:
            values, nbytes = gguf.GGML_QUANT_SIZES[gguf_files.type_named(kind)]
            data = np.resize(some, (shape[0], shape[1] // values * nbytes))
        writer.add_tensor(name, data, raw_dtype=gguf_files.type_named(of(name, shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(params=WIDTHS)
def model(request, tmp_path, monkeypatch):
    """(the spec of a model in blocks, whether it is of a published width)"""
    if request.param == "14B" and not request.config.getoption("--all-files"):
        pytest.skip("is one of --all-files")
    file = wan(tmp_path / "wan.gguf", *WIDTHS[request.param], monkeypatch)
    return DiffusionModelSpec(path=str(file), dtype="bfloat16", packed=True), request.param == "14B"


def test_the_bytes_of_a_device_are_predicted_and_held(model, new_runtime):
    """Those of the weights to the byte. At a published width also those of a whole job, within the bar of all
    predictions: the weights and what is dequantized at a time."""
    spec, is_wide = model
    facts = models.read(spec, kind="cpu")
    (expert,) = facts.experts
    planned = on_device(kept(expert, rules_of(facts, expert), facts.dtype, Share(packed=True)), "meta")
    network = Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise
    held = sum(parameter.nbytes for parameter in network.parameters())
    in_full = sum(2 * parameter.numel() for parameter in models_of(network))
    print(f"\n{planned} bytes predicted, {held} held; the linear layers of blocks in bfloat16 would take {in_full}")
    assert planned == held
    if not is_wide:
        return
    del network
    runtime, shape = new_runtime(1, **GIVES_BACK), (1, 16, 1, 16, 16)

    def work():
        prompt = torch.randn(1, TEXT_TOKENS, random_wan.TEXT_DIM)
        runtime.sample(spec, SampleSpec(steps=1, guidance_scale=1.0), torch.zeros(shape), prompt)

    try:
        work()
        runtime.free()
        (took,) = taken(runtime, work)
    finally:
        runtime.stop()
    video = Video(shape, ((0, 1),), TEXT_TOKENS)
    machine = Machine("cpu", "cpu", 1, 2**40, 2**40)
    parts = memory.predicted(facts, video, Arrangement(Plan(), packed=True), machine, 0).device["denoise"]
    said = sum(parts.values())
    listed = ", ".join(f"{name} {size / MB:.0f}" for name, size in parts.items() if size >= MB)
    print(f"{said / MB:.0f} MB predicted, {took / MB:.0f} taken, {said / took:.3f} ({listed})")
    assert took <= said <= MOST * took


def models_of(network):
    """The weights that are in blocks, as numbers."""
    layers = [layer for layer in network.modules() if hasattr(layer, "kind")]
    return [torch.empty(layer.out_features, layer.in_features, device="meta") for layer in layers]


def test_the_way_is_chosen_by_memory(tmp_path, monkeypatch):
    """In full where that fits, as it is faster; else in blocks; else it is refused. What is set is taken."""
    spec = DiffusionModelSpec(path=str(wan(tmp_path / "wan.gguf", 512, 1024, monkeypatch)))
    facts = models.read(spec, kind="npu")
    video = Video((1, 16, 1, 16, 16), ((0, 1),), TEXT_TOKENS)

    def chosen(device_memory, **fixed):
        machine = Machine("npu", "a2", 1, device_memory, 2**40)
        return choice.choose(facts, video, machine, rates.of_card("a2"), Fixed(experts="resident", **fixed)).chosen

    full, blocks = (chosen(2**40, packed=packed).memory.device_peak for packed in (False, True))
    print(f"\n{full} bytes in full, {blocks} in blocks")
    assert blocks < full
    assert not chosen(2**40).arrangement.packed and chosen(2**40, packed=True).arrangement.packed
    assert chosen(full).arrangement.packed is False and chosen(full - 1).arrangement.packed is True
    assert "weights as the GGUF file has them" in choice.choose(
        facts, video, Machine("npu", "a2", 1, full - 1, 2**40), rates.of_card("a2")
    ).line
    with pytest.raises(ValueError, match="AV-1210"):
        chosen(blocks // 2)
    with pytest.raises(ValueError, match="AV-1210"):
        chosen(full - 1, packed=False)
