"""A family from outside of the pack does all that the runtime does, by nothing but its door (models/family.py)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plain_toy
import pytest
import toy_family
import torch
from ascend_runtime import (
    AccelerationSpec,
    AttentionCacheSpec,
    BlockCacheSpec,
    DiffusionModelSpec,
    LoraSpec,
    ParallelSpec,
    RainFusionSpec,
    Runtime,
    SampleSpec,
    StepCacheSpec,
    TextEncoderSpec,
    VaeSpec,
)
from ascend_runtime.client.model_calls import NetworkPass
from ascend_runtime.commands import calibration, inspection
from ascend_runtime.models.family import TEXT_ENCODER, TRANSFORMER, VAE
from ascend_runtime.models.registry import FAMILIES_VARIABLE, families
from ascend_runtime.recognition.kinds import Kind, renumbered
from ascend_runtime.recognition.layout import find_component
from ascend_runtime.wire.messages import Conditioning, SamplerRun
from safetensors.torch import save_file
from toy_family import files

HELPERS = Path(toy_family.__file__).resolve().parents[1]
PROMPTS = {"positive": "a Red circle moving right", "negative": "blurry"}
LATENT = (1, toy_family.CHANNELS, 3, 6, 10)  # 45 tokens of video, and 6 or 2 of text
LITTLE = (1, toy_family.CHANNELS, 1, 2, 4)  # 2 and 6: the second rank has none of the video
LARGE = (1, toy_family.CHANNELS, 5, 16, 16)  # 3 mask blocks of video, one of which the text ends
PLANS = {
    "cfg": {"cfg_degree": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "tp": {"tp_degree": 2},
    "ulysses, fsdp": {"ulysses_degree": 2, "fsdp": True},
}
CACHES = {
    "attention cache": {"attention_cache": AttentionCacheSpec(start=1, interval=2, first_block=1)},
    "block cache": {"block_cache": BlockCacheSpec(start=1, interval=2, first_block=1, last_block=3)},
    "first-block cache": {"step_cache": StepCacheSpec(method="fbcache", threshold=2.0)},
    "TeaCache": {"step_cache": StepCacheSpec(method="teacache", threshold=0.9)},
    "TaylorSeer": {"step_cache": StepCacheSpec(method="taylorseer", interval=3, first_steps=2)},
    "RainFusion": {"rainfusion": RainFusionSpec(sparsity=0.9, start=1)},
}


MEASURE = AccelerationSpec(measure=True)


class Toy:
    """A Toy on disk, as diffusers lays it out and as single files, and groups of one and of two ranks."""

    def __init__(self, root, new_runtime):
        self.folder, self.files = files.folder(root / "toy"), files.single_files(root / "files")
        self.model = DiffusionModelSpec(path=str(self.folder))
        self.vae, self.encoder = VaeSpec(path=str(self.folder)), TextEncoderSpec(path=str(self.folder))
        environment = {FAMILIES_VARIABLE: "toy_family", "PYTHONPATH": str(HELPERS)}
        self.ranks = {number: new_runtime(number, **environment) for number in (1, 2)}
        self.prompts = {}

    def sample(self, ranks=1, *, model=None, plan=None, shape=LATENT, steps=4, **options):
        given = {name: options.pop(name, self.prompts[name]) for name in PROMPTS}
        spec = SampleSpec(steps=steps, solver="euler", seed=5)
        parallel = ParallelSpec(ranks=ranks, **{"cfg_degree": 1, **(plan or {})})
        result = self.ranks[ranks].sample(model or self.model, spec, torch.zeros(shape), *given.values(),
                                          parallel=parallel, **options)  # fmt: skip
        assert result.tensor.shape == shape and result.tensor.std() > 0.1
        return result


@pytest.fixture(scope="module")
def toy(tmp_path_factory, new_runtime):
    made = Toy(tmp_path_factory.mktemp("toy"), new_runtime)
    try:
        with ThreadPoolExecutor() as starting:
            list(starting.map(Runtime.start, made.ranks.values()))
        for name, prompt in PROMPTS.items():
            made.prompts[name] = made.ranks[1].encode(made.encoder, prompt).conditioning
        yield made
    finally:
        for group in made.ranks.values():
            group.stop()


@pytest.fixture
def known(monkeypatch):
    """The Toy is a family of this process too, for one test."""
    monkeypatch.setenv(FAMILIES_VARIABLE, "toy_family")
    families.cache_clear()
    yield
    monkeypatch.undo()
    families.cache_clear()


def near(one, other, within=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=within)


# One rank equals what is written out in plain_toy.py


def expected(toy, shape=LATENT, weights=None, prompts=None):
    weights = plain_toy.Weights(weights or files.random_weights(TRANSFORMER))
    both = [(prompt.text, prompt.pooled) for prompt in (prompts or toy.prompts).values()]
    return plain_toy.sampled(weights, both, shape, steps=4, seed=5)


@pytest.mark.parametrize("shape", [LATENT, LITTLE, (2, *LATENT[1:])])
def test_one_rank_makes_what_a_plain_loop_makes(toy, shape):
    if shape[0] == 1:
        near(toy.sample(shape=shape).tensor, expected(toy, shape), 1e-4)
        return
    both = toy.sample(shape=shape).tensor  # two videos of one prompt, of another noise each
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(*noise)
    near(toy.sample(2, shape=shape, plan={"ulysses_degree": 2}).tensor, both)


def test_a_prompt_is_words_and_one_vector(toy):
    """Both encoders' results, by hand, on the CPU of one rank and on both ranks; the vector changes the video."""
    made = toy.prompts["positive"]
    text, pooled = plain_toy.prompt(PROMPTS["positive"])
    near(made.text, text)
    near(made.pooled, pooled)
    shared = TextEncoderSpec(path=str(toy.folder), placement="ranks")
    on_ranks = toy.ranks[2].encode(shared, PROMPTS["positive"]).conditioning
    near(on_ranks.text, made.text)
    near(on_ranks.pooled, made.pooled)
    other = Conditioning(text=made.text, pooled=-made.pooled)
    changed = toy.sample(positive=other).tensor
    assert (changed - toy.sample().tensor).abs().max() > 0.01
    near(changed, expected(toy, prompts=toy.prompts | {"positive": other}), 1e-4)
    with pytest.raises(ValueError, match=r"has no pooled vector; this model reads \[1, 12\]"):
        toy.sample(positive=Conditioning(text=made.text))


# Many ranks equal one


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_make_what_one_makes(toy, plan):
    near(toy.sample(2, plan=PLANS[plan]).tensor, toy.sample().tensor)


@pytest.mark.parametrize("plan", ["ulysses", "ring"])
def test_a_rank_may_have_only_text(toy, plan):
    for cache in ({}, CACHES["first-block cache"]):  # which looks at the video's tokens
        options = {"shape": LITTLE, "acceleration": AccelerationSpec(**cache)}
        near(toy.sample(2, plan=PLANS[plan], **options).tensor, toy.sample(**options).tensor)


def test_layers_in_8_bits_are_those_of_both_kinds_of_blocks(toy):
    model = DiffusionModelSpec(path=str(toy.folder), quantization="w8a8_dynamic")
    made, exact = toy.sample(model=model).tensor, toy.sample().tensor
    near(toy.sample(2, model=model, plan=PLANS["ulysses"]).tensor, made, 1e-4)
    assert 1e-4 < (made - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("cache", CACHES)
def test_accelerators_leave_out_the_same_on_two_ranks(toy, cache):
    options = {"acceleration": AccelerationSpec(**CACHES[cache]), "steps": 6}
    if cache == "RainFusion":
        options["shape"] = LARGE
    one = toy.sample(**options)
    facts = one.info["acceleration"]
    shared = ["ulysses, fsdp"] if cache == "TeaCache" else []  # it looks at a block's weights
    for plan in ["ulysses", *shared]:
        two = toy.sample(2, plan=PLANS[plan], **options)
        near(two.tensor, one.tensor, 1e-4)
        others = two.info["acceleration"]
        assert facts["steps_reusing"] == others["steps_reusing"]
        within = 0.1 if cache == "RainFusion" else 1e-6  # a rank speaks of its own heads
        assert facts["flops_saved"] == pytest.approx(others["flops_saved"], rel=within)
    assert 0 < facts["flops_saved"] < 1
    plain = toy.sample(**options | {"acceleration": AccelerationSpec()}).tensor
    assert 1e-5 < (one.tensor - plain).norm() / plain.norm() < 1


@pytest.mark.parametrize("plan", ["cfg", "ulysses", "ring"])
def test_what_is_measured_is_the_video_on_any_number_of_ranks(toy, plan):
    """For a calibration: the text's tokens and padding do not count."""
    one, two = (made.info["acceleration"]["changes"] for made in
                (toy.sample(acceleration=MEASURE), toy.sample(2, plan=PLANS[plan], acceleration=MEASURE)))  # fmt: skip
    assert len(one) == len(two) == 3
    for change, other in zip(one, two):
        for name in ("timestep", "output", "ratio"):
            assert other[name] == pytest.approx(change[name], rel=1e-4) and change[name] > 0


def test_what_a_cache_saves_is_counted_by_kind_of_block(toy):
    """A block cache over the two double blocks saves more than one over two single ones."""

    def saved(first, last):
        cache = BlockCacheSpec(start=1, interval=2, first_block=first, last_block=last)
        info = toy.sample(acceleration=AccelerationSpec(block_cache=cache)).info["acceleration"]
        return info["flops_saved"], info["blocks_skipped"]

    (double, blocks), (single, others) = saved(0, 1), saved(2, 3)
    tokens, width = 45 + 6, 32
    shared = 4 * tokens**2 * width + 8 * tokens * width**2
    each = shared + 16 * tokens * width**2, shared + 8 * tokens * width**2
    assert blocks == others and double / single == pytest.approx(each[0] / each[1])


# The VAE


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_vae_makes_of_tiles_what_it_makes_of_a_whole(toy, ranks):
    weights, generator = files.random_weights(VAE), torch.Generator().manual_seed(1)
    latent, video = torch.randn(2, 16, 3, 5, 7, generator=generator), torch.rand(9, 48, 32, 3, generator=generator)
    frames = toy.ranks[ranks].decode(toy.vae, latent)
    assert frames.info["tiles"] == ("1 x 1" if ranks == 1 else "1 x 2")
    near(frames.tensor, torch.cat([plain_toy.decoded(weights, one) for one in latent]))
    near(toy.ranks[ranks].encode_video(toy.vae, video).tensor[0], plain_toy.encoded(weights, video))
    assert frames.tensor.std() > 0.05


# Files


def test_single_files_hold_the_same_model(toy):
    """Under other names, with fused layers, exchanged halves and both text encoders in one."""
    plain = toy.sample().tensor
    model = DiffusionModelSpec(path=str(toy.files[TRANSFORMER]))
    assert torch.equal(toy.sample(model=model).tensor, plain)
    near(toy.sample(2, model=model, plan=PLANS["tp"]).tensor, plain)
    made = toy.ranks[1].encode(TextEncoderSpec(path=str(toy.files[TEXT_ENCODER])), PROMPTS["positive"]).conditioning
    assert torch.equal(made.text, toy.prompts["positive"].text)
    assert torch.equal(made.pooled, toy.prompts["positive"].pooled)
    one, other = (toy.ranks[1].decode(VaeSpec(path=str(path)), plain) for path in (toy.folder, toy.files[VAE]))
    assert torch.equal(one.tensor, other.tensor)


def test_a_lora_changes_a_model_as_its_formula_says(toy, tmp_path):
    """In the file form's names, of a fused layer; and in its own."""
    weights, generator = files.random_weights(TRANSFORMER), torch.Generator().manual_seed(2)
    shapes = {"lora_unet_double_blocks_0_img_qkv": (96, 32), "single_blocks.2.widen": (64, 32)}
    tensors = {}
    for layer, (out, into) in shapes.items():
        tensors[f"{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator) / 4
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, into, generator=generator) / 4
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    fused, widen = (
        0.7 * 2 / 4 * tensors[f"{layer}.lora_up.weight"] @ tensors[f"{layer}.lora_down.weight"] for layer in shapes
    )
    for name, change in zip("qkv", fused.chunk(3)):
        weights[f"double_blocks.0.video.to_{name}.weight"] += change
    weights["single_blocks.2.widen.weight"] += widen
    lora = LoraSpec(path=str(tmp_path / "lora.safetensors"), strength=0.7)
    made = toy.sample(model=toy.model.with_lora(lora))
    assert "warnings" not in made.info and (made.tensor - toy.sample().tensor).abs().max() > 0.01
    near(made.tensor, expected(toy, weights=weights), 1e-4)
    near(toy.sample(2, model=toy.model.with_lora(lora), plan=PLANS["tp"]).tensor, made.tensor)


def test_inspect_knows_a_folder_and_files_of_it(toy, known, capsys):
    for path, parts in {toy.folder: 4, **dict.fromkeys(toy.files.values(), None)}.items():
        assert inspection.run(type("Arguments", (), {"path": str(path)})) == 0
        said = capsys.readouterr().out
        assert parts is None or said.count("complete") == parts
    inspection.run(type("Arguments", (), {"path": str(toy.folder)}))
    assert "recognised as Toy-1; its default settings: 4 steps, shift 2, guidance 3" in capsys.readouterr().out


def test_blocks_of_both_kinds_move_behind_those_of_earlier_shards(known):
    """A shard's own numbers begin at 0, for each kind."""
    kind = Kind("toy", TRANSFORMER)
    names = ("double_blocks.0.video.mod.bias", "single_blocks.1.mod.bias", "proj_out.bias")
    moved_names = [renumbered(kind, name, (2, 3)) for name in names]
    assert moved_names == ["double_blocks.2.video.mod.bias", "single_blocks.4.mod.bias", "proj_out.bias"]


def test_calibrate_makes_random_prompts_of_all_that_a_model_reads(toy, known):
    """As it would give them, each of a text and a pooled vector."""
    found = find_component(str(toy.folder), TRANSFORMER)
    arguments = type("Arguments", (), {"random_prompts": 2})
    first, second = calibration._prompts(arguments, toy.ranks[1], found, None)
    assert not torch.equal(first[0].pooled, second[0].pooled)
    toy.sample(positive=first[0], negative=first[1])


def test_a_model_is_run_with_its_familys_own_values(toy):
    made = toy.ranks[1].sample(toy.model, SampleSpec(seed=5, solver="euler"), torch.zeros(LATENT),
                               *toy.prompts.values())  # fmt: skip
    assert {"steps": 4, "guidance": 3.0, "shift": 2.0}.items() <= made.info.items()
    assert torch.equal(made.tensor, toy.sample().tensor)


@pytest.mark.parametrize("module, says", [
    ("no_such_module", "a module with a FAMILY .ModuleNotFoundError: No module named"),
    ("plain_toy", "no attribute 'FAMILY'"), ("raises", "ZeroDivisionError"), ("..", "TypeError"),
    ("toy_family", "family 'toy' with the schedule 'toy'; wan, hunyuan_video, toy are taken"),
    ("second_wan", "family 'wan' .* wan, hunyuan_video, toy are taken"),
    ("second_own", "schedule 'own'; .* hunyuan_video, own, simple, toy, wan as"),
])  # fmt: skip
def test_a_module_that_has_no_family_of_its_own_is_refused(known, monkeypatch, tmp_path, module, says):
    named = "from toy_family import Toy\nclass Second(Toy):\n    name, schedule = {!r}, {!r}\nFAMILY = Second()"
    contents = {"raises": "1 / 0", "second_wan": named.format("wan", "x"), "second_own": named.format("x", "own")}
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(FAMILIES_VARIABLE, f"toy_family, {module}")
    with pytest.raises(ValueError, match=f"(?s){FAMILIES_VARIABLE} names '{module}', .*{says}"):
        families()


def test_samplers_of_core_comfyui_are_refused_by_name_as_core_does_not_know_it(toy):
    group = toy.ranks[1]
    with pytest.raises(ValueError, match="Core ComfyUI does not know Toy models. Load them with Ascend"):
        group.network(toy.model)
    prompt = NetworkPass("cond", torch.zeros(LATENT), torch.tensor([500.0]), {"text": toy.prompts["positive"].text})
    with pytest.raises(ValueError, match="cannot be called by samplers outside of the ranks"):
        group.velocity(toy.model, [prompt], SamplerRun(number=1, sigmas=(0.5, 0.0)), 0)


def test_nothing_of_it_is_left_in_this_process():
    assert "toy" not in families()
