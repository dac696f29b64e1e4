"""Step caches against diffusers' own, where it has them, and against what they are to do."""

import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime import DiffusionModelSpec, SampleSpec, VideoSize
from ascend_runtime.models.shared.block_stack import At, BlockStack
from ascend_runtime.acceleration.tally import Tally
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.acceleration.step_cache import Expansion, StepCache
from ascend_runtime.acceleration.step_rules import Always, FirstBlock, MagCache, Reference, TeaCache, polynomial
from ascend_runtime.specs import AccelerationSpec, Calibration, StepCacheSpec
from ascend_runtime.recognition.calibration_file import calibration_file, write_calibration
from ascend_runtime.engine import generation
from ascend_runtime.engine.generation import Request
from ascend_runtime.models.shared.conditioning import Given
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan.calibrations import COEFFICIENTS, RATIOS, published
from ascend_runtime.models.wan.transformer import _indicator
from ascend_runtime.models.wan.defaults import WAN21_IMAGE, WAN21_TEXT, WAN22_TEXT
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.mag_cache import nearest_interp
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from torch.testing import assert_close

SIZE = VideoSize(width=80, height=64, num_frames=9)
STEPS, LAYERS = 12, 3
RATIOS_OF_STEPS = (1.0, *(1 - 0.004 * (step % 5) - 0.03 * (step > 9) for step in range(1, STEPS)))


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    """A model with a calibration beside it."""
    folder = shutil.copytree(checkpoints(layers=LAYERS), tmp_path_factory.mktemp("step caches") / "model")
    known = Calibration(coefficients=(0.1, 0.0), ratios=RATIOS_OF_STEPS, source="a test")
    write_calibration(calibration_file(str(folder)), {"high_noise": known})
    return DiffusionModelSpec(path=str(folder))


def theirs(config, text):
    """diffusers' latent, not normalised, and the steps whose last block it left out: without guidance, as its two
    branches decide each for itself."""
    pipeline = tiny_models.wan_pipeline(layers=LAYERS)
    pipeline.transformer.enable_cache(config)
    calls, computed = [0], []
    pipeline.transformer.blocks[-1].attn1.register_forward_hook(lambda *_: computed.append(calls[0]))
    pipeline.transformer.proj_out.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    latent = pipeline(
        height=SIZE.height, width=SIZE.width, num_frames=SIZE.num_frames, num_inference_steps=STEPS,
        output_type="latent", generator=torch.Generator().manual_seed(5), guidance_scale=1.0, prompt_embeds=text,
    ).frames  # fmt: skip
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in
                 (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std))  # fmt: skip
    assert calls == [STEPS]
    return latent * std + mean, sorted(set(range(STEPS)) - set(computed))


def ours(runtime, model, text, negative=None, guidance=1.0, **spec):
    spec = AccelerationSpec(step_cache=StepCacheSpec(**spec) if spec else None)
    settings = SampleSpec(seed=5, steps=STEPS, shift=5.0, guidance_scale=guidance)
    return runtime.sample(model, settings, torch.zeros(SIZE.latent_shape()), text, negative, acceleration=spec)


@pytest.mark.parametrize("threshold", [0.3, 0.75])
def test_the_first_block_cache_is_diffusers(one_rank, specs, model, threshold):
    expected, left_out = theirs(FirstBlockCacheConfig(threshold=threshold), specs.text(1))
    made = ours(one_rank, model, specs.text(1), method="fbcache", threshold=threshold, last_steps=0)
    facts = made.info["acceleration"]
    assert facts["steps_reusing"] == left_out and (left_out or threshold < 0.5)
    assert facts["blocks_skipped"] == len(left_out) * (LAYERS - 1), "the first block is computed"
    assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("threshold, most", [(0.04, 2), (0.08, 3)])
def test_magcache_is_diffusers(one_rank, specs, model, threshold, most):
    config = MagCacheConfig(threshold=threshold, max_skip_steps=most, retention_ratio=0.2, num_inference_steps=STEPS,
                            mag_ratios=list(RATIOS_OF_STEPS))  # fmt: skip
    expected, left_out = theirs(config, specs.text(1))
    made = ours(one_rank, model, specs.text(1), method="magcache", threshold=threshold, most=most, last_steps=0)
    assert made.info["acceleration"]["steps_reusing"] == left_out != []
    assert made.info["acceleration"]["calibration"] == {"high_noise": "a test"}
    assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)


def test_ratios_for_another_number_of_steps_are_diffusers():
    draw = random.Random(4)
    for length in range(2, 51):
        ratios = (1.0, *(draw.uniform(0.9, 1.1) for _ in range(length - 1)))
        for steps in range(2, 60):
            expected = nearest_interp(torch.tensor(ratios, dtype=torch.float64), steps).tolist()
            ours = Calibration(ratios=ratios).ratios_of(steps)
            scale = (length - 1) / (steps - 1)
            halves = [step for step in range(steps) if abs(step * scale % 1 - 0.5) < 1e-4]  # fp32 rounds them its way
            assert [r for s, r in enumerate(ours) if s not in halves] == \
                [r for s, r in enumerate(expected) if s not in halves]  # fmt: skip


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_the_expansion_is_diffusers(order):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    expansion, reference = Expansion(order), TaylorSeerState(torch.float32, order)
    for step in range(20):
        reference.current_step = step
        if step == 0 or draw.random() < 0.5:
            value = torch.randn(1, 5, 3, generator=generator)
            expansion.learn(value, step)
            reference.update((value,))
        x = torch.randn(1, 5, 3, generator=generator)
        assert_close(expansion.added_to(x, step), x + reference.predict()[0], atol=1e-3, rtol=1e-4)


def test_an_expansion_of_order_n_foretells_polynomials_of_degree_1():
    """Backward differences are exact derivatives of straight lines, whatever the steps between."""
    expansion, slope, start = Expansion(3), torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    for step in (0, 3, 4, 9):
        expansion.learn(start + step * slope, step)
    assert_close(expansion.added_to(torch.zeros(1, 4, 2), 14), start + 14 * slope, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("method", ["fbcache", "teacache", "magcache", "taylorseer"])
def test_threshold_0_leaves_nothing_out(one_rank, specs, model, method):
    dense = ours(one_rank, model, specs.text(1), specs.text(2), guidance=3.0)
    made = ours(one_rank, model, specs.text(1), specs.text(2), guidance=3.0, method=method, threshold=0.0)
    assert "acceleration" not in dense.info and made.info["acceleration"]["steps_reusing"] == []
    assert torch.equal(made.tensor, dense.tensor)


@pytest.mark.parametrize("method, expected", [
    ("taylorseer", [3, 4, 5, 7, 8, 9]),
    ("magcache", None), ("teacache", None), ("fbcache", None),
])  # fmt: skip
def test_first_and_last_steps_and_those_in_a_row(one_rank, specs, model, method, expected):
    """With a threshold that lets all pass, nothing but these is computed; both branches in the same steps."""
    made = ours(one_rank, model, specs.text(1), specs.text(2), guidance=3.0, method=method, threshold=100.0)
    default = {"magcache": [step for step in range(2, 11) if step % 3 != 1]}.get(method, list(range(1, 11)))
    facts = made.info["acceleration"]
    assert facts["steps_reusing"] == (expected or default)
    assert facts["blocks_skipped"] == 2 * len(facts["steps_reusing"]) * (LAYERS - (method == "fbcache"))
    made = ours(one_rank, model, specs.text(1), specs.text(2), guidance=3.0, method=method, threshold=100.0,
                first_steps=3, last_steps=2, most=2, interval=9)  # fmt: skip
    assert made.info["acceleration"]["steps_reusing"] == [3, 4, 6, 7, 9]
    assert made.tensor.isfinite().all()


@pytest.fixture
def alone():
    """A group that has this process as its only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(rule, changes, always=(0,), most=100):
    """The steps that a cache leaves out whose first block, and whose timestep, are multiplied by 1 + change in each."""
    tally, left_out = Tally(Work((BlockWork(1.0, 1.0, 1.0),) * 2, rest=1.0)), []
    cache, value = StepCache(rule, always, most, 0, tally), 1.0
    for step, change in enumerate(changes):
        value *= 1 + change
        stack = BlockStack(lambda block, x: x + value, 2, lambda *_: torch.full((1, 6, 2), value))
        tally.began(At("high_noise", "cond", step))
        before = sum(tally._blocks.values())
        cache.blocks(At("high_noise", "cond", step), stack, torch.zeros(1, 3, 2))
        left_out += [step] * (sum(tally._blocks.values()) > before)
    return left_out


def test_the_first_block_cache_compares_with_the_last_computed_step(alone):
    assert run(FirstBlock(0.05, 3), [0, 0.03, 0.03, 0.03, 0.03]) == [1, 3]


def test_teacache_sums_up_what_it_expects(alone):
    assert run(TeaCache(0.15, (1.0, 0.0), 3), [0] + [0.06] * 6) == [1, 2, 4, 5]
    assert run(TeaCache(0.15, (-1.0, 0.0), 3), [0] + [0.06] * 6) == [1, 2, 4, 5], "its expectations have no sign"
    assert run(TeaCache(0.15, (1.0, 0.0), 3), [0] + [0.06] * 6, always=(0, 2)) == [1, 3, 4, 6], "a step that is forced"
    assert run(TeaCache(0.15, (float("nan"), 0.0), 3), [0] + [0.06] * 6) == []


def test_magcache_sums_up_errors(alone):
    ratios = dict(enumerate([1.0] + [0.97] * 6))
    assert run(MagCache(0.1, ratios), [0] * 7) == [1, 2, 4, 5]  # .03, + .0591, + .0873
    assert run(Always(0.1), [0] * 7, most=2) == [1, 2, 4, 5]


class Told:
    """A rule that lets all pass, and notes what it is asked."""

    leading = 0

    def __init__(self):
        self.asked = []

    def sees(self, stack, tokens, led):
        return tokens

    def reuses(self, step, seen, forced):
        self.asked.append((step, None if seen is None else seen.item(), forced))
        return not forced


@pytest.mark.parametrize("branches, seen", [(("cond", "uncond"), 1.0), (("cond",), 1.0), (("uncond",), None)])
def test_the_cond_branch_decides_once_a_step(branches, seen):
    """And a rank that computes uncond alone counts nothing."""
    rule, tally = Told(), Tally(Work((BlockWork(1.0, 1.0, 1.0),) * 2, rest=1.0))
    cache = StepCache(rule, (0,), 100, 0, tally)
    for step in range(2):
        for branch in branches:
            value = {"cond": 1.0, "uncond": 5.0}[branch]
            tally.began(at := At("high_noise", branch, step))
            stack = BlockStack(lambda block, x: x * 2, 2, lambda *_: torch.zeros(1))
            assert cache.blocks(at, stack, torch.tensor([[[value]]])).item() == 4 * value, "each has its own"
    assert rule.asked == [(0, seen, True), (1, seen, False)]
    assert tally.facts()["blocks_skipped"] == 2 * len(branches)


def test_padding_is_not_looked_at():
    tokens, led = torch.zeros(1, 3, 2), torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(FirstBlock(0.1, 2).sees(BlockStack(None, 1, None), tokens, led), led[:, :2])
    assert FirstBlock(0.1, 0).sees(BlockStack(None, 1, None), tokens, led).numel() == 0
    each = torch.randn(1, 3, 6, 128)
    seen = TeaCache(0.1, (), 2).sees(BlockStack(None, 1, partial(_indicator, each)), tokens, led)
    assert torch.equal(seen, each[:, :2, :, [0, 64]])
    whole = each[:, 0]
    assert torch.equal(TeaCache(0.1, (), 2).sees(BlockStack(None, 1, partial(_indicator, whole)), tokens, led), whole)


def test_nothing_compared_with_nothing_is_a_change(alone):
    reference = Reference()
    reference.keep(torch.zeros(1, 0, 4))
    assert reference.change(torch.zeros(1, 0, 4)) == float("inf")


def test_polynomials_are_numpys():
    numpy = pytest.importorskip("numpy")
    coefficients = (1071.4715, -402.012359, 56.8921048, -2.13799679, 0.0679963458)
    for x in (0.0, 0.01, 0.3):
        assert polynomial(coefficients, x) == pytest.approx(numpy.polyval(coefficients, x), rel=1e-12)


def test_a_step_that_is_left_out_runs_no_block(alone):
    ran = []
    stack = BlockStack(lambda block, x: (ran.append(block), x + 1)[1], 5, lambda *_: torch.ones(1, 6, 2))
    tally = Tally(Work((BlockWork(1.0, 1.0, 1.0),) * 5, rest=1.0))
    cache = StepCache(FirstBlock(10.0, 3), (0,), 100, 0, tally)
    for step in range(2):
        tally.began(At("high_noise", "cond", step))
        out = cache.blocks(At("high_noise", "cond", step), stack, torch.full((1, 3, 2), float(step)))
        assert torch.equal(out, torch.full((1, 3, 2), step + 5.0))
    assert ran == [0, 1, 2, 3, 4, 0]


# What is known of models


def test_published_figures_are_found_by_the_model():
    small = published(WAN21_TEXT, 1536, 832 * 480, "high_noise")
    assert small.coefficients == COEFFICIENTS["Wan2.1-T2V-1.3B"] and len(small.ratios) == 50
    assert small.source == "published, of Wan2.1-T2V-1.3B"
    assert published(WAN21_TEXT, 5120, 1, "high_noise").ratios == RATIOS["Wan2.1-T2V-14B"]
    assert published(WAN21_TEXT, 192, 1, "high_noise") == Calibration()
    for pixels, name in ((832 * 480, "Wan2.1-I2V-14B-480P"), (1280 * 720, "Wan2.1-I2V-14B-720P")):
        assert published(WAN21_IMAGE, 5120, pixels, "high_noise").coefficients == COEFFICIENTS[name]
    both = {expert: published(WAN22_TEXT, 5120, 1, expert) for expert in ("high_noise", "low_noise")}
    assert [len(both[expert].ratios) for expert in both] == [26, 14] and not both["low_noise"].coefficients
    assert all(ratios[0] == 1.0 and min(ratios) > 0.75 for ratios in RATIOS.values())


def test_a_models_own_calibration_comes_first_and_must_be_of_its_experts():
    own = {"high_noise": Calibration(coefficients=(1.0, 0.0))}
    request = Request(Given(torch.zeros(1, 16, 1, 8, 8), None, {}), SampleSpec(), calibration=own)
    model = SimpleNamespace(adapters={"high_noise": None}, high_noise=SimpleNamespace(config={}), family=family("wan"),
                            defaults=WAN21_TEXT, pixels_of=math.prod)  # fmt: skip
    assert generation._known(model, request) == own
    model.adapters["low_noise"] = None
    with pytest.raises(ValueError, match="is for high_noise, but the model has high_noise, low_noise. Calibrate"):
        generation._known(model, request)


def test_a_model_of_which_nothing_is_known(one_rank, specs):
    told = ours(one_rank, specs.model, specs.text(1), method="teacache").info["acceleration"]
    assert told["calibration"] == {"high_noise": "nothing is known"}
    halves = Calibration(ratios=(1.0, 0.9), source="published")
    assert [halves.source_for(method) for method in ("magcache", "teacache")] == ["published", "nothing is known"]
    with pytest.raises(ValueError, match="this model has no calibration. Run `python -m ascend_runtime calibrate"):
        ours(one_rank, specs.model, specs.text(1), method="magcache")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"high_noise": {"ratios": ["a"]}}',
                                     b'{"high_noise": {"coefficients": [1e999]}}'])  # fmt: skip
def test_a_file_that_is_no_calibration(one_rank, specs, model, tmp_path, content):
    folder = shutil.copytree(model.path, tmp_path / "model")
    calibration_file(str(folder)).write_bytes(content)
    with pytest.raises(ValueError, match="is not a calibration .* Remove it, or calibrate the model again"):
        ours(one_rank, DiffusionModelSpec(path=str(folder)), specs.text(1), method="magcache")
