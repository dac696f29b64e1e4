"""The bytes of weights that the planner counts are those that components count before they read, to the byte."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import comfy_formats
import described_folders
import gguf_files
import pytest
import random_hunyuan
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.checkpoints.reader import BytesRead
from ascend_runtime.components import HostMemory, diffusion_model
from ascend_runtime.components.room import Room
from ascend_runtime.models.registry import FAMILIES_VARIABLE, families
from ascend_runtime.parallel.dry import Seat, dry_tensor_parallel
from ascend_runtime.parallel.fsdp import Sharding
from ascend_runtime.planner import models
from ascend_runtime.planner.holding.weights import Share, kept, on_device, rules_of
from safetensors.torch import load_file
from toy_family import files

CASES = 6  # of each family


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setenv(FAMILIES_VARIABLE, "toy_family")
    families.cache_clear()
    yield
    families.cache_clear()


def wan(folder, rng):
    heads, width = rng.choice([2, 4, 6]), rng.choice([12, 24])
    sees = {"image_dim": 40, "added_kv_proj_dim": heads * width, "in_channels": 36} if rng.random() < 0.3 else {}
    made = tiny_models.wan_transformer(
        num_attention_heads=heads, attention_head_dim=width, num_layers=rng.randint(1, 3),
        ffn_dim=heads * rng.choice([16, 21]), **sees,
    )  # fmt: skip
    made.save_pretrained(folder / "transformer")
    return heads


def hunyuan(folder, rng):
    heads = rng.choice([2, 4, 6])
    made = random_hunyuan.transformer(
        rng.choice(list(random_hunyuan.KINDS)), num_attention_heads=heads, num_layers=rng.randint(1, 2)
    )
    made.save_pretrained(folder / "transformer")
    return heads


def toy(folder, rng):
    files.folder(folder)
    return files.CONFIGS["transformer"]["num_attention_heads"]


@pytest.mark.parametrize("make", [wan, hunyuan, toy])
def test_weights_take_what_components_count(make, tmp_path, rng, toys):
    for case in range(CASES):
        folder = tmp_path / str(case)
        heads = make(folder, rng)
        spec = DiffusionModelSpec(
            path=str(folder), dtype=rng.choice(["float32", "bfloat16"]),
            quantization=rng.choice(["none", "w8a8_dynamic"]),
        )  # fmt: skip
        tp = rng.choice([degree for degree in (1, 2, 3) if heads % degree == 0])
        shards = rng.randint(1, 5)
        share = Share(tp, rng.randrange(tp), shards, rng.randrange(shards))
        for kind in ("cpu", "meta"):  # a CPU maps what it keeps as it is stored
            expected, planned = counted(spec, share, kind), predicted(spec, share, kind)
            print(f"{spec.dtype}, {spec.quantization}, {share}, {kind}: {planned} bytes, {expected} by components")
            assert planned == expected


def counted(spec, share, kind):
    """Bytes by the components' own check before they read."""
    mesh = SimpleNamespace(size=lambda: share.shards, get_local_rank=lambda: share.shard)
    sharding = Sharding(dry_tensor_parallel(Seat(share.tp, share.slice)), mesh if share.shards > 1 else None)
    room = Room(torch.device(kind), sharding, HostMemory(0))
    return diffusion_model.opened(spec, diffusion_model.files(spec), room, BytesRead(lambda *_: None)).nbytes


def predicted(spec, share, kind):
    model = models.read(spec, kind="cpu")
    return sum(on_device(kept(one, rules_of(model, one), model.dtype, share), kind) for one in model.experts)


def test_weights_of_a_gguf_file_take_what_components_count(tmp_path, rng):
    """In full and in blocks, also where tensor parallelism cuts within blocks; with all types of them."""
    state = load_file(random_wan.original_transformer(tmp_path / "wan.safetensors", layers=2))
    gguf_files.write(tmp_path / "wan.gguf", state, gguf_files.mixed())
    degrees = [(1, 1), (rng.choice([1, 2]), rng.randint(1, 5))]  # only who holds all of a weight maps it
    for dtype, (tp, shards) in itertools.product(["float32", "bfloat16", "float16"], degrees):
        whole = Share(tp, rng.randrange(tp), shards, rng.randrange(shards))
        sizes = {}
        for kind, packed in itertools.product(("cpu", "meta"), (True, False)):
            spec = DiffusionModelSpec(path=str(tmp_path / "wan.gguf"), dtype=dtype, packed=packed)
            share = replace(whole, packed=packed)
            expected, planned = counted(spec, share, kind), predicted(spec, share, kind)
            print(f"{dtype}, {share}, {kind}: {planned} bytes, {expected} by components")
            assert planned == expected
            sizes[kind, packed] = planned
        assert all(sizes[kind, True] < sizes[kind, False] for kind in ("cpu", "meta")), sizes


ALGORITHMS = ("W8A8", "W8A8_MXFP8", "W4A4_DYNAMIC")
FORMATS = ("int8 by row", "int4", "mxfp8")


def test_weights_in_few_bits_take_what_components_count(tmp_path, rng):
    """Bytes of 4 bits or 8 are kept as they lie on disk, or made of others of the same size; so are scales."""
    network = tiny_models.wan_transformer(5, attention_head_dim=32, ffn_dim=256)
    tensors = dict(network.state_dict())
    config = json.loads(network.to_json_string())
    folders = {name: tmp_path / name for name in (*ALGORITHMS, *FORMATS)}
    for name in ALGORITHMS:
        described_folders.write(folders[name], tensors, name, config=config)
    for name in FORMATS:
        comfy_formats.folder(folders[name], tensors, config, name)
    for name, folder in folders.items():
        spec = DiffusionModelSpec(path=str(folder), dtype=rng.choice(["float32", "bfloat16", "float16"]))
        assert predicted(spec, Share(), "cpu") == counted(spec, Share(), "cpu"), spec
