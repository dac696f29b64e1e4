"""(d) How often the host waits for an NPU in a step of the denoise loop: never in the blocks, and once a step for the
velocity, as the solver runs on the CPU. A step cache that measures a change adds one wait.

Contract, not device: the loop, its solver and its numbers are the real ones; the card is pretended (pretend_card.py),
and a fake group stands for several ranks. A wait is what torch_npu's sources make one.
"""

import math
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import cpu_kernels
import mindiesd  # noqa: F401 - its operators get stand-ins too
import pytest
import random_hunyuan
import torch
import torch.distributed as dist
from ascend_runtime.components import Components
from ascend_runtime.engine.denoising import StepsOfJob, denoised
from ascend_runtime.engine.generation import Generation, Ranks, Request
from ascend_runtime.engine.job import Job
from ascend_runtime.hardware import devices
from ascend_runtime.hardware.environment import with_defaults
from ascend_runtime.models.shared.conditioning import Given
from ascend_runtime.ops import operators_for
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.parallel import mesh
from ascend_runtime.parallel.sequence import spread
from ascend_runtime.specs import (
    AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, DiffusionModelSpec, LoraSpec, OperatorSpec, Plan,
    RainFusionSpec, SampleSpec, StepCacheSpec,
)  # fmt: skip
from ascend_runtime.wire.messages import Conditioning
from msgspec.structs import replace
from safetensors.torch import save_file
from pretend_card import CPU, NPU, Card
from tiny_models import wan_transformer
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

SHAPE = (1, 16, 3, 16, 20)  # 240 tokens, 2 mask blocks
STEPS, SEED = 5, 3
VELOCITY, MEASURE = "engine/denoising.py", "parallel/mesh.py"  # where the host waits


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    cpu_kernels.register()
    with torch.no_grad():
        yield


@contextmanager
def first_of_ranks(plan):
    """This process is the first of a plan's ranks, whose groups do nothing, and so cannot be seen to be connected."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(plan.degrees))
    with patch.object(mesh, "_connect", lambda group, kind: None):
        yield
    dist.destroy_process_group()
    mesh.mesh_of.cache_clear()
    mesh._groups.clear()


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Of a Wan model with one expert, and of one with two, which stay on the card or take turns on it; and of
    HunyuanVideo's models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(2):
        wan_transformer(seed).save_pretrained(folder / f"expert {seed}")
    one, two = (str(folder / f"expert {seed}") for seed in range(2))
    both = {"low_noise_path": two, "boundary": 0.8}
    given = {"one": {}, "two": {**both, "experts": "resident"}, "in turns": {**both, "experts": "swap"}}
    made = {name: DiffusionModelSpec(path=one, dtype="bfloat16", **fields) for name, fields in given.items()}
    for kind in random_hunyuan.KINDS:
        (folder / kind).mkdir()
        path = str(random_hunyuan.folder(folder / kind, kind))
        made[kind] = DiffusionModelSpec(path=path, dtype="bfloat16")
    made["in 8 bits"] = replace(made["t2v"], quantization="w8a8_dynamic")
    parts = {"lora_A": torch.ones(4, 96), "lora_B": torch.ones(96, 4)}
    tensors = {f"transformer.blocks.0.attn1.to_q.{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "lora.safetensors")
    lora = LoraSpec(path=str(folder / "lora.safetensors"))
    made["with a LoRA"] = made["one"].with_lora(lora)
    for name, base in (("one", "one of 8 bits"), ("in turns", "in turns, of 8 bits")):
        made[base] = replace(made[name], quantization="w8a8_dynamic")
        made[f"{base}, with a LoRA"] = made[base].with_lora(lora)
    return made


class Client:
    """A channel to a client that says nothing. previews: how many it was sent."""

    previews = 0

    def take(self):
        return None

    def send(self, message):
        self.previews += type(message).__name__ == "Preview"


class Numbered:
    """In the place of a recorder of steps."""

    def __init__(self, card):
        self._card = card

    @contextmanager
    def step(self, number):
        self._card.step = number
        yield
        self._card.step = 0


class Run:
    """A job on the pretended card, or on the CPU. waits: those of its steps. earlier: models of jobs before, on a card
    that has no room for two."""

    def __init__(
        self, specs, device=NPU, model="one", plan=Plan(), acceleration=AccelerationSpec(), preview=False, known=False,
        guidance=4.0, earlier=(),
    ):  # fmt: skip
        self.card, self.client = Card(), Client()
        with first_of_ranks(plan), self.card, patch.object(torch.npu, "synchronize", self.card.synchronise):
            model = _loaded(Components(device), [specs[name] for name in (*earlier, model)])
            for expert in {id(expert): expert for expert in model.experts}.values():
                self.card.watch(expert)
            request = _request(model, acceleration, known, guidance)
            generation = Generation.prepare(model, request, _ranks(plan, model))
            job = Job(SimpleNamespace(job=1, preview=preview), self.client, device)
            steps = StepsOfJob(job, model, generation, Numbered(self.card))
            self.latent = denoised(generation, model, request, steps).latent
        self.waits = [wait for wait in self.card.waits if wait.step]
        self.fetched = 0 if model.swap is None else model.swap.fetched

    def counted(self):
        """[how often the host waited in a step, for all steps]"""
        found = Counter(wait.step for wait in self.waits)
        return [found[step] for step in range(1, STEPS + 1)]

    def places(self):
        return sorted({wait.place.rpartition(":")[0] for wait in self.waits})


def _loaded(held, specs):
    """The last model, after those before it had its place."""
    get, (*earlier, last) = lambda spec: held.get(spec, lambda *_: None), specs
    with patch.object(devices, "room", lambda device: 0):
        models = [get(spec) for spec in earlier]
        model = get(last)
    assert not models or model is models[0]
    return model


def _request(model, acceleration, known, guidance):
    generator = torch.Generator().manual_seed(SEED)
    family, config = model.family, model.high_noise.config
    text, pooled = family.text_width(config), family.pooled_width(config)

    def prompt():
        vector = {"pooled": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return Conditioning(text=torch.randn(1, 12, text, generator=generator), **vector)

    prompts = {name: prompt() for name in ("positive", "negative")[: 1 if guidance == 1 else 2]}
    spec = SampleSpec(seed=SEED, steps=STEPS, guidance_scale=guidance, shift=3.0, solver="unipc")
    spec = model.defaults.fill(spec, model.pixels_of(SHAPE))
    mask = (torch.arange(SHAPE[2]).view(1, 1, -1, 1, 1) > 0).float().expand(1, 1, *SHAPE[2:]) if known else None
    return Request(Given(torch.zeros(SHAPE), mask, prompts), spec, acceleration)


def _ranks(plan, model):
    """As `Ranks.arranged`, but for groups of the CPU, as the fake group is."""
    computing = operators_for(model.device, with_defaults(OperatorSpec(), {}), model.dtype)
    made = mesh.mesh_of("cpu", plan)
    sequence = spread(made, computing, ring_exchange="gather")
    for expert in model.experts:
        expert.arrange(computing, sequence)
    return Ranks(plan, computing, sequence, made.group("cfg"))


def cached(method, **values):
    return {"acceleration": AccelerationSpec(step_cache=StepCacheSpec(method=method, **values))}


def sparse(version):
    spec = RainFusionSpec(version=version, sparsity=0.8, start=1, refresh=2)
    return {"acceleration": AccelerationSpec(rainfusion=spec)}


CASES = {
    "one rank": {},
    "two experts": {"model": "two"},
    "two experts that take turns": {"model": "in turns"},
    "a LoRA on 8 bits, slices": {"model": "one of 8 bits, with a LoRA", "plan": Plan(tp=2)},
    "previews": {"preview": True},
    "known frames": {"known": True},
    "guidance on two ranks, Ulysses": {"plan": Plan(cfg=2, ulysses=2)},
    "guidance on two ranks, slices": {"plan": Plan(cfg=2, tp=2)},
    "a ring that gathers": {"plan": Plan(ring=2, ulysses=2)},
    "attention cache": {"acceleration": AccelerationSpec(attention_cache=AttentionCacheSpec(start=1, interval=2))},
    "block cache": {"acceleration": AccelerationSpec(block_cache=BlockCacheSpec(start=1, interval=2))},
    "RainFusion v1": sparse("v1"),
    "RainFusion v2": sparse("v2"),
    "RainFusion v3": sparse("v3"),
    "taylorseer": cached("taylorseer", interval=2, first_steps=1, last_steps=1),
}
T2V = {"model": "t2v", "guidance": 1.0}  # HunyuanVideo's default: embedded guidance, and one branch
CASES |= {f"HunyuanVideo, {name}": {**T2V, **job} for name, job in {
    "one rank": {},
    "true guidance": {"guidance": 4.0},
    "true guidance on two ranks, Ulysses": {"guidance": 4.0, "plan": Plan(cfg=2, ulysses=2)},
    "Ulysses": {"plan": Plan(ulysses=4)},
    "a ring": {"plan": Plan(ring=2)},
    "slices": {"plan": Plan(tp=2)},
    "slices and Ulysses": {"plan": Plan(ulysses=2, tp=2)},
    "in 8 bits": {"model": "in 8 bits"},
    "33 channels": {"model": "i2v concat", "known": True},
    "a first frame that is replaced": {"model": "i2v replace", "known": True},
    "a first frame that is replaced, Ulysses": {"model": "i2v replace", "known": True, "plan": Plan(ulysses=2)},
    "attention cache": CASES["attention cache"],
    "block cache": CASES["block cache"],
    "RainFusion v1": sparse("v1"),
    "RainFusion v2": sparse("v2"),
    "taylorseer": CASES["taylorseer"],
}.items()}  # fmt: skip
MEASURING = {
    "fbcache": cached("fbcache", threshold=0.1, first_steps=1, last_steps=1),
    "teacache": cached("teacache", threshold=0.1, first_steps=1, last_steps=1),
}
MEASURING |= {f"HunyuanVideo, {name}": {**T2V, **job} for name, job in MEASURING.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_a_step(specs, case):
    run = Run(specs, **CASES[case])
    print(f"\n{case}: {run.counted()} waits in its steps, in {', '.join(run.places())}")
    assert not any(wait.in_block for wait in run.waits)
    assert run.counted() == [1] * STEPS and run.places() == [VELOCITY]
    assert run.client.previews == (STEPS if case == "previews" else 0)
    assert (run.fetched > 0) == (case == "two experts that take turns")


@pytest.mark.parametrize("case", MEASURING)
def test_a_step_cache_that_measures_adds_one_wait(specs, case):
    """In the steps in which it may decide: not in the first, nor in the last. It lies between the blocks."""
    run = Run(specs, **MEASURING[case])
    print(f"\n{case}: {run.counted()} waits in its steps, in {', '.join(run.places())}")
    assert not any(wait.in_block for wait in run.waits)
    assert run.counted() == [1, *[2] * (STEPS - 2), 1] and run.places() == [VELOCITY, MEASURE]


@pytest.mark.parametrize("job", [{}, T2V], ids=["Wan", "HunyuanVideo"])
def test_the_pretended_card_computes_what_the_cpu_does(specs, job):
    made, expected = (Run(specs, device=device, **job).latent for device in (NPU, CPU))
    error = (made - expected).square().mean().sqrt() / expected.std()
    print(f"\n{error:.1e} off in bfloat16, seed {SEED}")
    assert expected.std() > 0.5 and error < 2e-2


@pytest.mark.parametrize("model, earlier", [
    ("one", ("one", "in turns")), ("two", ("two", "one")), ("in turns", ("in turns", "t2v")),
    ("in 8 bits", ("in 8 bits", "one")), ("t2v", ("t2v", "in 8 bits")),
    ("with a LoRA", ("with a LoRA", "two")), ("one", ("with a LoRA", "two")),
    ("one of 8 bits", ("one of 8 bits, with a LoRA", "two")),
    ("in turns, of 8 bits, with a LoRA", ("in turns, of 8 bits, with a LoRA", "t2v")),
])  # fmt: skip
def test_a_model_that_waited_on_the_host_computes_what_it_did(specs, model, earlier):
    """To the bit; also with a LoRA that is taken out afterwards, from originals that stayed on the host, and with what
    LoRAs add next to 8 bits, which waits there too."""
    guidance = 1.0 if model in ("in 8 bits", "t2v") else 4.0
    latents = [Run(specs, model=model, guidance=guidance, earlier=which).latent for which in ((), earlier)]
    assert latents[0].std() > 0.5 and torch.equal(*latents)


@pytest.mark.parametrize("job", [{}, T2V], ids=["Wan", "HunyuanVideo"])
def test_this_test_sees_what_waits_in_a_block(specs, monkeypatch, job):
    planted = {
        "_local_scalar_dense": lambda x: float(x[0, 0, 0]),
        "is_nonzero": lambda x: bool((x > 0).any()),
        "equal": lambda x: torch.equal(x, x),
        "nonzero": lambda x: x.nonzero(),
        "index of": lambda x: x[x > 0],
        "to the host": lambda x: x.cpu(),
        "from the host, blocking": lambda x: x + torch.ones(x.shape).to(x.device, x.dtype),
        "from the host, not pinned": lambda x: torch.empty_like(x).copy_(torch.ones(x.shape), non_blocking=True),
        "synchronize": lambda x: devices.synchronise(NPU),
    }
    gelu, waits = AscendOperators.gelu, planted.values()
    monkeypatch.setattr(AscendOperators, "gelu", lambda self, x: (gelu(self, x), *(do(x) for do in waits))[0])
    run = Run(specs, **job)
    whys = " ".join(wait.why for wait in run.waits if wait.in_block and wait.step == 2)
    assert [words for words in planted if words not in whys and words != "is_nonzero"] == []
    assert not [wait for wait in run.waits if wait.in_block and wait.place == "outside of the package"]
