"""The host's memory: what is available, also to a container, and what two experts that take turns need, before any
weight is read."""

import random
import re

import psutil
import pytest
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.checkpoints import reader
from ascend_runtime.components import Components, HostMemory, pinned, text_encoder
from ascend_runtime.hardware import cores, devices, memory
from ascend_runtime.planner.holding import slabs
from diffusers import WanTransformer3DModel
from gloo_ranks import run
from msgspec.structs import replace
from sparse_files import write_sparse_shards
from transformers import UMT5Config, UMT5EncoderModel

CPU = torch.device("cpu")
V1, V2 = "cgroup cgroup rw,memory", "cgroup2 cgroup2 rw,nsdelegate"
LARGE = 9223372036854771712  # what cgroup v1 says without a limit


# What is available


@pytest.fixture
def process(tmp_path, monkeypatch):
    """`process(mount, group=(limit, used, cached), ...)`: a fake /proc/self of a process in group /a/b, on a host with
    100 GB available; groups are named by their paths, _ for /."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000_000_000}))

    def process(mount, **groups):
        proc, point = tmp_path / "proc", tmp_path / "cgroup"
        proc.mkdir()
        (proc / "cgroup").write_text("0::/a/b\n" if mount == V2 else "4:cpu:/elsewhere\n3:memory:/a/b\n0::/\n")
        (proc / "mountinfo").write_text(f"30 25 0:28 / {point} rw,nosuid shared:9 - {mount}\n")
        for name, (limit, used, cached) in groups.items():
            folder = point / name.replace("_", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            names = ("max", "current") if mount == V2 else ("limit_in_bytes", "usage_in_bytes")
            for file, value in zip((f"memory.{name}" for name in names), (limit, used)):
                (folder / file).write_text(f"{value}\n")
            stat = {"anon": used - cached, "active_file": cached // 4, "inactive_file": cached - cached // 4}
            prefix = "" if mount == V2 else "total_"  # v1 counts groups below by names of their own
            own = "" if mount == V2 else "active_file 1\ninactive_file 1\n"
            (folder / "memory.stat").write_text(own + "".join(f"{prefix}{key} {n}\n" for key, n in stat.items()))
        return proc

    return process


@pytest.mark.parametrize("mount, none", [(V1, LARGE), (V2, "max")])
def test_a_containers_limit_bounds_what_is_available_and_its_cached_files_do_not_count(process, mount, none):
    GB = 10**9
    proc = process(mount, a=(none, 70 * GB, GB), a_b=(64 * GB, 50 * GB, 20 * GB))
    assert memory.available(proc) == (64 - 50 + 20) * GB


@pytest.mark.parametrize("mount, none", [(V1, LARGE), (V2, "max")])
def test_a_group_above_counts_as_well(process, mount, none):
    assert memory.available(process(mount, a=(40, 30, 8), a_b=(none, 30, 8))) == 18


@pytest.mark.parametrize("mount, none", [(V1, LARGE), (V2, "max")])
def test_without_a_limit_it_is_the_hosts(process, mount, none):
    assert memory.available(process(mount, a=(none, 3, 1))) == 100_000_000_000


def test_a_group_above_its_limit_has_nothing_left(process):
    assert memory.available(process(V2, a_b=(40, 50, 0))) == 0


def test_without_proc(tmp_path):
    """What another process may take meanwhile: 1 GB."""
    assert abs(memory.available(tmp_path) - psutil.virtual_memory().available) < 2**30


# Where tensors lie


def random_weights(seed):
    generator = random.Random(seed)
    dtypes = (torch.bfloat16, torch.float32, torch.int8)
    return {
        expert: {
            str(n): torch.empty([generator.choice((0, 1, 3, 40, 999)), generator.randint(1, 99)], device="meta",
                                dtype=generator.choice(dtypes))
            for n in range(generator.randint(1, 40))
        }
        for expert in ("high_noise", "low_noise")
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_tensors_lie_side_by_side_in_slabs_of_powers_of_two(seed, monkeypatch):
    print(f"seed {seed}")
    monkeypatch.setattr(slabs, "SLAB", 2**15)  # some tensors are larger
    weights = random_weights(seed)
    layout = pinned.Layout.of(weights)
    assert all(size & (size - 1) == 0 for size in layout.sizes)
    made, written = layout.allocated(CPU), {}
    generator = torch.Generator().manual_seed(seed)
    for expert, tensors in made.items():
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (weights[expert][name].shape, weights[expert][name].dtype)
            assert tensor.is_contiguous() and (not tensor.numel() or tensor.data_ptr() % slabs.ALIGNED == 0)
            written[expert, name] = torch.randint(-99, 99, tensor.shape, generator=generator).to(tensor.dtype)
            tensor.copy_(written[expert, name])
    for (expert, name), value in written.items():
        assert torch.equal(made[expert][name], value), f"{expert} {name} was overwritten by another"
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for t in made.values() for x in t.values()}
    assert sorted(found.values()) == sorted(layout.sizes) and sum(found.values()) == layout.nbytes


# Wan2.2-A14B

A14B = {"num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
        "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True}  # fmt: skip


def round_up(nbytes):
    """To a power of two, as pinned allocators do."""
    rounded = 1
    while rounded < nbytes:
        rounded *= 2
    return rounded


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """(a folder of both experts, whose weights are holes in sparse files; diffusers' network of one)."""
    folder = tmp_path_factory.mktemp("a14b")
    with torch.device("meta"):
        network = WanTransformer3DModel(**A14B)
    for expert in ("transformer", "transformer_2"):
        network.save_config(folder / expert)
        write_sparse_shards(folder / expert, network.state_dict(), torch.bfloat16)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline", "boundary_ratio": 0.875}')
    return folder, network


def load(folder, host_memory, **spec):
    spec = DiffusionModelSpec(path=str(folder), dtype="bfloat16", experts="swap", **spec)
    return Components(CPU).get(spec, lambda *_: None, host_memory=HostMemory(host_memory))


@pytest.mark.parametrize("ranks, exact, by_tensor", [(8, 458, 701), (16, 916, 1401)])
def test_experts_in_turns_are_counted_before_they_are_read_and_refused_above_the_host(
    a14b, ranks, exact, by_tensor, monkeypatch
):
    """`exact` and `by_tensor`: GB, as somebody else computed them from the published shapes: within 0.5%."""
    folder, network = a14b
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(reader, "read_in_pieces", lambda *_: pytest.fail("a weight is read"))
    sizes = 2 * [2 * p.numel() for p in network.parameters()]
    assert ranks * sum(sizes) / 1e9 == pytest.approx(exact, rel=5e-3)
    assert ranks * sum(map(round_up, sizes)) / 1e9 == pytest.approx(by_tensor, rel=5e-3)
    said = str(pytest.raises(ValueError, load, folder, 400 * 10**9).value)
    print(said)
    each, allocated, together, available, free = map(float, re.findall(r"([\d.]+) GB", said))
    print(f"{ranks} ranks: {ranks * each:.0f} GB exact, {together:.0f} GB as allocated; {by_tensor} GB by tensor")
    assert ranks * each == pytest.approx(exact, rel=5e-3)
    assert together == pytest.approx(ranks * allocated, rel=2e-3) and together <= 1.03 * exact
    assert (available, free) == (400.0, 8.6)
    for words in ("turn fsdp on", "set quantization to 'w8a8_dynamic'", f"{ranks} rank(s)", "use at most 6 rank(s)"):
        assert words in said


def test_quantized_on_the_fly_they_take_about_half(a14b, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    said = [str(pytest.raises(ValueError, load, a14b[0], 10**9, quantization=name).value)
            for name in ("none", "w8a8_dynamic")]  # fmt: skip
    whole, in_8_bits = (float(re.search(r"([\d.]+) GB together", text)[1]) for text in said)
    assert 0.5 < in_8_bits / whole < 0.65


def test_what_loras_keep_counts_as_well(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    weights = {"high_noise": {"a": torch.empty(2**28, device="meta", dtype=torch.int8)}}
    layout, memory_of_ranks = pinned.Layout.of(weights), 2 * 2**28
    pinned.require_room(layout, 0, memory_of_ranks + memory.ROOM)
    for originals, host in ((1, memory_of_ranks + memory.ROOM), (0, memory_of_ranks + memory.ROOM - 1)):
        with pytest.raises(ValueError, match="for each of 2 rank"):
            pinned.require_room(layout, originals, host)
    with pytest.raises(ValueError, match="and 1.0 GB for the original weights that LoRAs change, 2.5 GB together"):
        pinned.require_room(layout, 10**9, memory.ROOM)


def test_originals_that_loras_add_to_a_loaded_model_must_fit_too(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    pinned.require_room_for_originals(10**9, 8 * 10**9 + memory.ROOM)
    pinned.require_room_for_originals(0, 0)
    with pytest.raises(ValueError, match="1.0 GB for each of 8 rank.*8.0 GB together.*turn fsdp on"):
        pinned.require_room_for_originals(10**9, 8 * 10**9 + memory.ROOM - 1)


@pytest.mark.parametrize("ranks, dtype, left_out", [(1, torch.bfloat16, "fsdp"), (2, torch.int8, "quantization")])
def test_nothing_is_advised_that_would_not_help(monkeypatch, ranks, dtype, left_out):
    """One rank has nobody to share weights with; what is quantized already is not quantized again."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    layout = pinned.Layout.of({"high_noise": {"a": torch.empty(2**28, device="meta", dtype=dtype)}})
    said = str(pytest.raises(ValueError, pinned.require_room, layout, 0, memory.ROOM).value)
    assert [word for word in ("fsdp", "quantization", "rank(s);", "in Python.") if word not in said] == [
        left_out, "rank(s);"
    ]  # fmt: skip


def test_all_ranks_count_with_the_same_memory(tmp_path):
    """On real ranks, of which each sees another number, and one has a model that can be replaced."""
    run("host_memory_rank.py", tmp_path, 3)


# UMT5-XXL on the CPU

GB = 10**9


@pytest.fixture(scope="module")
def umt5_xxl():
    with torch.device("meta"):
        config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        return UMT5EncoderModel(config)


@pytest.mark.parametrize("computes, nbytes, available, dtype, warns", [
    (True, 7 * GB, 200 * GB, torch.bfloat16, False), (True, 7 * GB, GB, torch.bfloat16, False),
    (False, 7 * GB, 32 * GB, torch.float32, False), (False, 7 * GB, 31 * GB, torch.bfloat16, True),
    (False, GB, GB, torch.float32, False), (True, GB, GB, torch.float32, False),  # a small encoder
])  # fmt: skip
def test_the_text_encoders_dtype_is_what_the_cpu_and_its_memory_can_do(
    umt5_xxl, computes, nbytes, available, dtype, warns, monkeypatch
):
    """In float32 it takes 22.7 GB, and 8.6 must stay free."""
    monkeypatch.setattr(cores, "compute_bfloat16", lambda: computes)
    monkeypatch.setattr(devices, "host_memory", lambda: available)
    chosen, warning = text_encoder._text_dtype(CPU, nbytes, umt5_xxl)
    assert chosen == dtype and (warning is not None) == warns
    if warns:
        for words in ("no bfloat16 instructions", "would take 22.7 GB", "31.0 GB are available",
                      "8.6 GB must stay free", "Set its placement to 'ranks'", "dtype to 'float32'"):  # fmt: skip
            assert words in warning


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_on_a_device_it_is_bfloat16(umt5_xxl, kind, monkeypatch):
    monkeypatch.setattr(cores, "compute_bfloat16", lambda: False)
    device = type("Device", (), {"type": kind})  # torch knows no "npu" here
    assert text_encoder._text_dtype(device, 2**20, umt5_xxl) == (torch.bfloat16, None)


def test_a_slow_text_encoder_is_reported_unless_its_dtype_is_given(specs, monkeypatch):
    monkeypatch.setattr(text_encoder, "_text_dtype", lambda *_: (torch.bfloat16, "It is slow."))
    loaded = Components(CPU).get(specs.encoder, lambda *_: None)
    assert loaded.warnings == ["It is slow."]
    assert all(p.dtype == torch.bfloat16 for one in loaded.encoders.values() for p in one.model.parameters())
    given = Components(CPU).get(replace(specs.encoder, dtype="float32"), lambda *_: None)
    assert given.warnings == []
