"""LoRAs on quantized weights make what a float twin makes that has them merged; and leave nothing when they go."""

import itertools

import comfy_formats
import described_folders
import hunyuan_lora
import merged_twins
import pytest
import random_hunyuan
import random_lora
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec
from ascend_runtime.components import Components
from ascend_runtime.components.loras.terms import nbytes_of
from ascend_runtime.models.shared.quantized.base import QuantizedLinear
from ascend_runtime.models.shared.quantized.static import use_step
from ascend_runtime.models.wan.files.names import to_diffusers_name
from ascend_runtime.models.wan.weights import kept_in_8_bits
from ascend_runtime.planner import models
from benchmarks.opens import Opened
from safetensors.torch import load_file, save_file

SHAPE = (1, 16, 2, 4, 6)
FLY = {"quantization": "w8a8_dynamic"}
FORMS = {
    "on the fly": None,
    "dynamic": {},
    "dynamic, smoothed": {"smoothed": True},
    "static": {"algorithm": "W8A8"},
    "static, smoothed": {"algorithm": "W8A8", "smoothed": True, "bits": True},
    "by timestep": {"algorithm": "W8A8_TIMESTEP"},
    "by timestep, static": {"algorithm": "W8A8_TIMESTEP"},
    "MXFP8": {"algorithm": "W8A8_MXFP8"},
    "MXFP8, smoothed": {"algorithm": "W8A8_MXFP8", "smoothed": True},
    "4 bits": {"algorithm": "W4A4_DYNAMIC"},
    "4 bits, smoothed": {"algorithm": "W4A4_DYNAMIC", "smoothed": True},
}
SAMPLE = "on the fly", "static, smoothed", "by timestep, static", "MXFP8, smoothed", "4 bits"
OF_TOKENS = "on the fly", "dynamic", "dynamic, smoothed", "by timestep"
STRENGTHS = 0.5, -0.2  # of the two LoRAs


def relative(made, exact):
    return float((made - exact).norm() / exact.norm())


def velocity(network, text_dim=random_wan.TEXT_DIM):
    generator = torch.Generator().manual_seed(3)
    latent, text = (torch.randn(*shape, generator=generator) for shape in (SHAPE, (1, 12, text_dim)))
    with torch.no_grad():
        return tiny_models.velocity(network, latent, torch.tensor([600.0]), text)


def total(*added):
    """The sum of (strength, what a LoRA adds by name)."""
    names = {name for _, each in added for name in each}
    return {name: sum(strength * each[name] for strength, each in added if name in each) for name in names}


class Case:
    """A quantized Wan of a form on disk, two LoRAs for it, and its merged twins."""

    def __init__(self, folder, form):
        self.form, self.step = form, 2 if form == "by timestep, static" else None
        original = load_file(random_wan.original_transformer(folder / "wan", seed=11))
        parameters = {to_diffusers_name(name): x for name, x in original.items()}
        self.files, self.added = [], []
        for seed, layout in enumerate(("lightx2v", "lycoris")):
            self.files.append(str(folder / f"{layout}.safetensors"))
            self.added.append(random_lora.save(folder / f"{layout}.safetensors", layout, parameters, seed=seed))
        if FORMS[form] is None:
            self.spec = {"path": str(folder / "wan"), **FLY}
            layers = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
            self.hows = {name: merged_twins.quantized_on_the_fly(parameters[f"{name}.weight"])
                         for name in layers if kept_in_8_bits(name)}  # fmt: skip
        else:
            self.spec = {"path": str(folder / "described")}
            hows = described_folders.write(folder / "described", original, **FORMS[form])
            self.hows = {to_diffusers_name(f"{name}.weight").removesuffix(".weight"): x for name, x in hows.items()}
        self.biases = {name: parameters[f"{name}.bias"] for name in self.hows}
        self.components = Components(torch.device("cpu"))

    def load(self, *strengths, components=None):
        loras = tuple(LoraSpec(path=file, strength=x) for file, x in zip(self.files, strengths) if x is not None)
        spec = DiffusionModelSpec(dtype="float32", loras=loras, **self.spec)
        network = (components or self.components).get(spec, lambda *_: None).high_noise
        use_step(network, self.step)
        return network

    def twin(self, *strengths, **how):
        network = self.load(components=Components(torch.device("cpu")))
        added = total(*((x, each) for x, each in zip(strengths, self.added) if x is not None))
        return network, merged_twins.merged(network, self.hows, self.biases, added, step=self.step, **how)


@pytest.fixture(params=FORMS)
def form(request):
    if request.param not in SAMPLE and not request.config.getoption("all_loras"):
        pytest.skip("is one of --all-loras")
    return request.param


def test_a_quantized_model_with_loras_equals_its_merged_twin(tmp_path, form):
    """With pairs, LoHa, LoKr, whole differences and biases on all its layers. What a LoRA adds sees the input before it
    is rounded; in a merged weight it sees the rounded one, which makes less than a percent of a layer where inputs are
    rounded to 8 bits by each token, and more where they are cut off or rounded to fewer."""
    case = Case(tmp_path, form)
    before = velocity(case.load())
    made = velocity(case.load(*STRENGTHS))
    exact, _ = case.twin(*STRENGTHS, rounded=False)
    off, moved = relative(made, velocity(exact)), relative(made, before)
    network, (_, twins) = case.load(*STRENGTHS), case.twin(*STRENGTHS)
    layers = {}
    for name, twin in twins.items():
        network.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name, twin=twin: layers.update({name: relative(out, twin(given[0]))})
        )
    velocity(network)
    print(f"\n{form}: {off:.1e} off the twin, {moved:.0%} of the output by LoRAs; layers at most "
          f"{max(layers.values()):.1e} off their merged weights")  # fmt: skip
    assert len(layers) == 18 and moved > 0.1
    assert off <= (1e-2 if "static" in form else 1e-4)
    assert max(layers.values()) <= (1e-2 if form in OF_TOKENS else 0.2)


def test_strengths_change_without_a_file_and_nothing_stays(tmp_path):
    """The integers are never written to, nor read again; what LoRAs take next to them is what is predicted: by the
    planner, which reads headers only, at most."""
    case = Case(tmp_path, "on the fly")
    for file in case.files:  # nothing that is merged, for which its file is read again
        layers = ("attn.q.", "ffn.0.", "attn_q.", "ffn_0.")
        save_file({name: x.clone() for name, x in load_file(file).items() if any(one in name for one in layers)}, file)
    network = case.load()
    integers = {name: (p.data_ptr(), p.clone()) for name, p in network.named_parameters() if p.dtype == torch.int8}
    (adapter,) = case.components.models.in_use.model.adapters.values()
    before, made = velocity(network), {}
    for strengths in ((0.5, None), (0.5, -0.2), (-1.0, 0.7), (0.0, 0.0)):
        made[strengths] = velocity(case.load(*strengths))
        fresh = velocity(case.load(*strengths, components=Components(torch.device("cpu"))))
        assert torch.equal(made[strengths], fresh), strengths
        loras = adapter.opened([LoraSpec(path=file, strength=x) for file, x in zip(case.files, strengths) if x])
        assert not loras or adapter.nbytes == nbytes_of(loras, adapter._target, adapter._share, torch.float32) > 0
        if strengths == (0.5, None):
            most = 4 * models.lora_numbers([LoraSpec(path=case.files[0])], experts=1)
            print(f"\n{adapter.nbytes} bytes next to the weights, at most {most} predicted")
            assert adapter.nbytes <= most <= 1.2 * adapter.nbytes
    assert torch.equal(made[0.0, 0.0], before)
    case.load(0.5, -0.2)
    with Opened([*case.files, tmp_path / "wan"]) as opened:
        assert not torch.equal(velocity(case.load(0.1, 0.4)), made[0.5, -0.2])
        assert torch.equal(velocity(case.load(0.5, -0.2)), made[0.5, -0.2])
    assert opened.files() == []
    assert torch.equal(velocity(case.load()), before) and adapter.nbytes == 0
    for name, (where, weight) in integers.items():
        parameter = network.get_parameter(name)
        assert parameter.data_ptr() == where and torch.equal(parameter, weight), name


def test_loras_on_a_hunyuan_video_whose_files_have_fused_layers(tmp_path):
    """Each of our layers gets its rows, or its columns, of a file's layer, if it is quantized or not."""
    theirs = random_hunyuan.transformer("t2v")
    parameters = random_hunyuan.parameters_of(theirs.state_dict())
    random_hunyuan.folder(tmp_path / "model", "t2v")
    inputs, made = random_hunyuan.inputs(theirs.config), {}

    def load(*loras):
        spec = DiffusionModelSpec(path=str(tmp_path / "model"), dtype="float32", loras=loras, **FLY)
        return Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise

    for layout in ("musubi-tuner", "diffusers"):
        file = tmp_path / f"{layout}.safetensors"
        added = random_hunyuan.parameters_of(hunyuan_lora.save(file, layout, theirs.state_dict(), seed=3))
        twin = load()
        layers = [name for name, layer in twin.named_modules() if isinstance(layer, QuantizedLinear)]
        hows = {name: merged_twins.quantized_on_the_fly(parameters[f"{name}.weight"]) for name in layers}
        biases = {name: parameters[f"{name}.bias"] for name in layers if f"{name}.bias" in parameters}
        merged_twins.merged(twin, hows, biases, {name: 0.8 * x for name, x in added.items()})
        with torch.no_grad():
            outs = [random_hunyuan.velocity(one, inputs)
                    for one in (load(LoraSpec(path=str(file), strength=0.8)), twin, load())]  # fmt: skip
        made[layout] = relative(*outs[:2]), relative(outs[0], outs[2])
        print(f"\n{layout}: {made[layout][0]:.1e} off the twin; the LoRA moves it by {made[layout][1]:.0%}")
        assert len({*added} & {f"{name}.weight" for name in layers}) == len(layers) == 30
        assert made[layout][0] <= 1e-2 < 0.05 < made[layout][1]


@pytest.mark.parametrize("form", ["int8, rotated", "int8 by row"])
def test_loras_on_files_of_comfyuis_formats(tmp_path, form):
    """What a LoRA adds sees the input before it is rotated. Formats that the device has no product for are merged."""
    network = tiny_models.wan_transformer(5, attention_head_dim=32, ffn_dim=256)
    config = {"_class_name": "WanTransformer3DModel", **{k: v for k, v in network.config.items() if k[0] != "_"}}
    path = comfy_formats.folder(tmp_path / "model", network.state_dict(), config, form)
    added = random_lora.save(tmp_path / "lora.safetensors", "lightx2v", network.state_dict(), seed=4)

    def load(*loras):
        spec = DiffusionModelSpec(path=str(path), dtype="float32", loras=loras)
        return Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise

    made, twin = load(LoraSpec(path=str(tmp_path / "lora.safetensors"), strength=0.3)), load()
    base, left, layers = velocity(twin, tiny_models.TEXT_DIM), dict(added), 0
    for name, layer in twin.named_modules():
        if isinstance(layer, QuantizedLinear) and f"{name}.weight" in added:
            weight, bias = left.pop(f"{name}.weight"), left.pop(f"{name}.bias", 0.0)
            layer.register_forward_hook(lambda _, x, out, w=weight, b=bias: out + 0.3 * (x[0] @ w.t() + b))
            layers += 1
    for name, difference in left.items():
        twin.get_parameter(name).data = twin.get_parameter(name) + 0.3 * difference
    made, expected = (velocity(one, tiny_models.TEXT_DIM) for one in (made, twin))
    off, moved = relative(made, expected), relative(made, base)
    print(f"\n{form}: {off:.1e} off the twin in {layers} layers; the LoRA moves it by {moved:.0%}")
    assert layers and off <= 1e-4 < 0.1 < moved


PLANS = {"FSDP 2": {"fsdp": True}, "slices 2": {"tp_degree": 2}, "Ulysses 2": {"ulysses_degree": 2, "cfg_degree": 1}}


def sample(runtime, model, text, **plan):
    spec = SampleSpec(steps=2, seed=1, guidance_scale=4.0, shift=5.0)
    return runtime.sample(model, spec, torch.zeros(SHAPE), text, -text, parallel=ParallelSpec(**plan)).tensor


@pytest.fixture(scope="module")
def loras(checkpoints, tmp_path_factory):
    """The files of two LoRAs for small Wans."""
    folder = tmp_path_factory.mktemp("loras")
    parameters = load_file(checkpoints() / "transformer" / "diffusion_pytorch_model.safetensors")
    for seed, layout in enumerate(("lightx2v", "lycoris")):
        random_lora.save(folder / f"{layout}.safetensors", layout, parameters, seed=seed)
    return [str(folder / f"{layout}.safetensors") for layout in ("lightx2v", "lycoris")]


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_make_the_video_of_one(one_rank, two_ranks, specs, loras, plan):
    text, plan = specs.text(1), {"ranks": 2, **PLANS[plan]}
    both = tuple(LoraSpec(path=file, strength=x) for file, x in zip(loras, STRENGTHS))
    base = DiffusionModelSpec(path=str(specs.folder), **FLY)
    with_loras = DiffusionModelSpec(path=str(specs.folder), loras=both, **FLY)
    before = sample(two_ranks, base, text, **plan)
    made, expected = sample(two_ranks, with_loras, text, **plan), sample(one_rank, with_loras, text, ranks=1)
    off, moved = relative(made, expected), relative(made, before)
    print(f"\n{plan}: {off:.1e} off one rank; LoRAs move it by {moved:.0%}")
    assert off <= 1e-2 < 0.1 < moved
    assert torch.equal(sample(two_ranks, base, text, **plan), before)


def test_each_expert_has_its_own_also_in_turns(one_rank, checkpoints, specs_of, loras):
    folder = checkpoints(experts=2)
    text, made = specs_of(folder).text(1), {}
    own = [LoraSpec(path=file, strength=x, expert=expert)
           for file, x, expert in zip(loras, STRENGTHS, ("high_noise", "low_noise"))]  # fmt: skip
    other = [LoraSpec(path=own[0].path, strength=0.3, expert="high_noise"), own[1]]
    for experts in ("resident", "swap"):
        made[experts] = [sample(one_rank, DiffusionModelSpec(path=str(folder), experts=experts, loras=chosen, **FLY),
                                text, ranks=1) for chosen in ((), own, own[:1], own[1:], other, ())]  # fmt: skip
        base, *changed, after = made[experts]
        assert torch.equal(base, after)
        assert all(relative(one, each) > 1e-2 for one, each in itertools.combinations([base, *changed], 2))
    assert all(map(torch.equal, *made.values()))
