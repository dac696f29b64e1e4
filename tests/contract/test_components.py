"""Networks on (fake) cards: where their weights lie, and when they are read."""

import pytest
import torch
import torch_npu
from safetensors.torch import save_file

counted = pytest.mark.skipif(not hasattr(torch.npu, "host_memory_stats"), reason=f"torch_npu {torch_npu.__version__} "
                             "neither counts pinned memory nor returns it")  # fmt: skip


def test_a_vae_waits_on_the_host_where_a_card_is_full(python_on, specs):
    code = f"""
        import torch
        from ascend_runtime import DiffusionModelSpec, VaeSpec
        from ascend_runtime.hardware import devices
        from ascend_runtime.components import Components
        from ascend_runtime.components.room import ROOM_TO_COMPUTE
        folder, read, free = {str(specs.folder)!r}, [], [2**40]
        devices.room = lambda device: free[0]
        held = Components(torch.device("npu:0"))
        get = lambda kind: held.get(kind(path=folder), lambda *_: read.append(kind))
        vae = get(VaeSpec)
        before = {{name: tensor.cpu() for name, tensor in vae.network.state_dict().items()}}
        get(DiffusionModelSpec)
        assert vae.device.type == "npu" and {{VaeSpec, DiffusionModelSpec}} == set(read)
        free[0] = ROOM_TO_COMPUTE - 1
        read.clear()
        get(DiffusionModelSpec)
        assert vae.device.type == "cpu"
        devices.empty_cache = lambda device: read.append("moved again")
        get(DiffusionModelSpec)
        assert get(VaeSpec) is vae and vae.device.type == "npu" and not read
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in vae.network.state_dict().items())
        print("there and back")
    """
    assert python_on("Ascend910B4", code) == "there and back"


def test_a_vae_is_in_bfloat16_and_strict_float32_is_refused_by_name(python_on, specs):
    """On an A2; "float32" leaves HF32 to convolutions."""
    code = f"""
        import torch
        from ascend_runtime import VaeSpec
        from ascend_runtime.components import Components
        from ascend_runtime.hardware import devices
        device = devices.take("npu", 0)
        held = Components(device)
        get = lambda dtype: held.get(VaeSpec(path={str(specs.folder)!r}, dtype=dtype), lambda *_: None).dtype
        print(get("auto"), get("float32"), torch.npu.conv.allow_hf32)
        try:
            get("float32_strict")
        except ValueError as error:
            print(error)
    """
    dtypes, refused = python_on("Ascend910B4", code).splitlines()
    assert dtypes == "torch.bfloat16 torch.float32 True"
    assert "'float32_strict', but convolutions on cards of the A2 series round float32 to HF32" in refused


@counted
def test_experts_in_turns_wait_in_pinned_memory_of_the_counted_size_which_is_returned(python_on, checkpoints):
    """The allocator that counts is torch_npu's own."""
    code = f"""
        import torch
        from ascend_runtime import DiffusionModelSpec
        from ascend_runtime.components import Components
        from ascend_runtime.components.room import ROOM_TO_COMPUTE
        from ascend_runtime.components.experts import HIGH_NOISE, LOW_NOISE
        from ascend_runtime.hardware import devices
        def pinned():
            stats = torch.npu.host_memory_stats()  # before 2.13 reserved_bytes too, as allocated_bytes is never less
            return stats.get("reserved_bytes.current", stats["allocated_bytes.current"])
        device, spec = torch.device("npu:0"), DiffusionModelSpec(path={str(checkpoints(experts=2))!r})
        resident = Components(device).get(spec, lambda *_: None)
        experts = {{HIGH_NOISE: resident.high_noise, LOW_NOISE: resident.low_noise}}
        needed = sum(p.nbytes for network in experts.values() for p in network.parameters())
        assert resident.swap is None and pinned() == 0
        for room, turns in ((needed + ROOM_TO_COMPUTE, False), (needed + ROOM_TO_COMPUTE - 1, True)):
            devices.room = lambda device: room
            held = Components(device)
            model = held.get(spec, lambda *_: None)
            assert (model.swap is not None) == turns
        assert model.low_noise is model.high_noise and all(p.is_npu for p in model.high_noise.parameters())
        assert needed <= pinned() == model.swap.host_bytes == sum(held.models.on_host) < 2 * needed
        for expert in (HIGH_NOISE, LOW_NOISE, HIGH_NOISE):
            model.swap.use(expert)
            for name, weight in experts[expert].named_parameters():
                host = model.swap.expert(expert).parameter(name)
                assert host.is_pinned() and torch.equal(host, weight.cpu()), name
                assert torch.equal(model.high_noise.get_parameter(name).cpu(), weight.cpu()), name
        del model, host
        held.free()
        assert pinned() == sum(held.models.on_host) == 0
        del torch.npu.host_empty_cache  # as older versions
        size = held.get(spec, lambda *_: None).swap.host_bytes
        held.free()
        assert pinned() == sum(held.models.on_host) == size, "it stays with torch, and the next model can use it"
        held.get(spec, lambda *_: None)
        assert pinned() == sum(held.models.on_host) == size
        print("pinned and returned")
    """
    assert python_on("Ascend910B4", code) == "pinned and returned"


def test_loras_whose_originals_do_not_fit_on_the_host_are_refused_before_a_weight_changes(python_on, specs, tmp_path):
    """Also for a model that is loaded already, whatever the ranks have taken since they agreed on what is free."""
    parts = {"lora_A": torch.ones(4, 96), "lora_B": torch.ones(96, 4)}
    tensors = {f"transformer.blocks.0.attn1.to_q.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    code = f"""
        import torch
        from ascend_runtime import DiffusionModelSpec, LoraSpec
        from ascend_runtime.components import Components, HostMemory
        from ascend_runtime.hardware import memory
        held, plain = Components(torch.device("npu:0")), DiffusionModelSpec(path={str(specs.folder)!r})
        weight = held.get(plain, lambda *_: None).high_noise.blocks[0].attn1.to_q.weight
        before = weight.cpu()
        try:
            held.get(plain.with_lora(LoraSpec(path={str(tmp_path / "lora.safetensors")!r})), lambda *_: None,
                     host_memory=HostMemory(free=memory.ROOM + 96 * 96 * 2 - 1, in_use=2**40, pinned=2**40))
        except ValueError as error:
            print(error, torch.equal(weight.cpu(), before))
    """
    said = python_on("Ascend910B4", code)
    assert said.startswith("AV-1204: The LoRAs change weights whose originals wait in host memory")
    assert said.endswith("True")


def test_models_change_places_between_a_card_and_the_host(python_on, specs, checkpoints):
    """Models with one expert, with two that stay, and with two that take turns: weights come back to the bit, and no
    file is read."""
    code = f"""
        import itertools
        import torch
        from ascend_runtime import DiffusionModelSpec
        from ascend_runtime.components import Components, HostMemory
        from ascend_runtime.hardware import devices, memory
        device = devices.take("npu", 0)
        one, two = {str(specs.folder)!r}, {str(checkpoints(experts=2))!r}
        specs = [
            DiffusionModelSpec(path=one),
            DiffusionModelSpec(path=two, experts="resident"), DiffusionModelSpec(path=two, experts="swap"),
        ]
        room, read = [0], []
        devices.room = lambda device: room[0]
        held = Components(device)
        get = lambda spec: held.get(spec, lambda *_: read.append(spec), host_memory=HostMemory(memory.ROOM + 2**40))
        weights = lambda model: [weight for network in model.experts for weight in network.parameters()]

        def begin(model):
            if model.swap is not None:
                model.swap.use("high_noise")

        for first, second in itertools.combinations(specs, 2):
            held.free()
            room[0] = 0
            models, values = [], []
            for spec in (first, second):
                models.append(get(spec))
                begin(models[-1])
                values.append([x.cpu() for x in weights(models[-1])])
            read.clear()
            for turn in (0, 1, 0):
                assert get((first, second)[turn]) is models[turn] and not read
                begin(models[turn])
                assert all(x.is_npu for x in weights(models[turn]))
                assert all(torch.equal(x.cpu(), y) for x, y in zip(weights(models[turn]), values[turn]))
                assert all(x.is_pinned() for x in weights(models[1 - turn])), "it waits on the host"
            room[0] = 2**40
            assert get(second) is models[1] and get(first) is models[0] and not read
            assert all(x.is_npu for model in models for x in weights(model)), "both stay where both fit"
        print("there and back")
    """
    assert python_on("Ascend910B4", code) == "there and back"


@counted
def test_the_host_holds_one_model_while_two_of_a_size_change_places(python_on, specs):
    """And a slab or two of the other. The allocator that counts is torch_npu's own."""
    code = f"""
        import torch
        from ascend_runtime import DiffusionModelSpec
        from ascend_runtime.components import Components, HostMemory
        from ascend_runtime.hardware import devices, memory
        from ascend_runtime.planner.holding import slabs
        slabs.SLAB = 2**17
        devices.room = lambda device: 0
        held = Components(devices.take("npu", 0))
        specs = [DiffusionModelSpec(path={str(specs.folder)!r}, boundary=boundary) for boundary in (0.0, 0.5)]
        for spec in specs * 3:
            held.get(spec, lambda *_: None, host_memory=HostMemory(memory.ROOM + 2**40))
        waits, most = held.models.on_host[1], torch.npu.host_memory_stats()["allocated_bytes.peak"]
        assert waits > 4 * slabs.SLAB and waits <= most <= waits + 2 * slabs.SLAB, (waits, most)
        print("one")
    """
    assert python_on("Ascend910B4", code) == "one"


def test_a_model_that_waits_gives_way(python_on, specs, checkpoints):
    """On a full host it is dropped, before a weight is read; later for what another model needs there. Where a card is
    short for a VAE, it leaves the card; with room it stays."""
    code = f"""
        import torch
        from ascend_runtime import DiffusionModelSpec, VaeSpec
        from ascend_runtime.components import Components, HostMemory
        from ascend_runtime.components.standby import ROOM_FOR_OTHERS
        from ascend_runtime.hardware import devices, memory
        one, other = (DiffusionModelSpec(path={str(specs.folder)!r}, boundary=boundary) for boundary in (0.0, 0.5))
        turns = DiffusionModelSpec(path={str(checkpoints(experts=2))!r}, experts="swap")
        vae, room, read = VaeSpec(path={str(specs.folder)!r}), [2**40], []
        devices.room = lambda device: room[0]
        held = Components(devices.take("npu", 0))
        models = held.models

        def get(spec, free):
            read.clear()
            in_use, waiting, kept = models.on_host
            host = HostMemory(memory.ROOM + free, in_use, waiting)
            return held.get(spec, lambda *_: read.append(spec), host_memory=host)

        def waits():
            return None if models.waiting is None else models.waiting.key.spec.boundary

        get(one, 0)
        to_host = models.in_use.to_host
        get(other, 0)
        assert waits() == 0.0 and not models.waiting.away, "both fit on the card"
        room[0] = 0
        get(one, to_host - 1)
        assert not read and waits() is None, "both were on the card; the host is too full for the one that leaves"
        get(other, to_host - 1)
        assert read and waits() is None
        get(one, to_host)
        assert waits() == 0.5 and models.waiting.away
        get(other, 0)
        assert not read and waits() == 0.0, "the one that comes back makes the place"

        turning = get(turns, 2**40).swap
        needs = turning.host_bytes
        held.free()
        get(one, 0)
        get(turns, needs + to_host - 1)
        assert waits() is None and models.in_use.model.swap, "experts in turns need it"
        held.free()
        get(one, 0)
        get(turns, needs + to_host)
        assert waits() is None or models.waiting.away
        assert models.in_use.model.swap and waits() == 0.0

        held.free()
        room[0] = ROOM_FOR_OTHERS
        for spec in (one, other):
            get(spec, 0)
        held.get(vae, lambda *_: None, host_memory=HostMemory(memory.ROOM + to_host))
        assert not models.waiting.away
        room[0] -= 1
        held.get(vae, lambda *_: None, host_memory=HostMemory(memory.ROOM + to_host))
        assert models.waiting.away
        get(one, 2**40)
        held.get(vae, lambda *_: None, host_memory=HostMemory(memory.ROOM + to_host - 1))
        assert waits() is None and not read
        print("gave way")
    """
    assert python_on("Ascend910B4", code) == "gave way"
