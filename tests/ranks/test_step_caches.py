"""Step caches against diffusers' own, where it has them, and against what they are to do."""

import dataclasses
import math
import random
import shutil
from functools import partial
from types import SimpleNamespace

import cached_models
import pytest
import random_hunyuan
import torch
import torch.distributed as dist
from ascend_runtime.models.shared.block_stack import At, BlockStack, Pass
from ascend_runtime.acceleration.tally import Tally
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.acceleration.step_cache import Expansion, StepCache
from ascend_runtime.acceleration.step_rules import Always, FirstBlock, MagCache, Reference, TeaCache, polynomial
from ascend_runtime.specs import AccelerationSpec, Calibration, StepCacheSpec
from ascend_runtime.recognition.calibration_file import calibration_file
from ascend_runtime.engine import generation
from ascend_runtime.models.hunyuan_video.defaults import IMAGE_CONCAT, IMAGE_REPLACE
from ascend_runtime.models.hunyuan_video.defaults import TEXT as HUNYUAN_TEXT
from ascend_runtime.models.registry import family
from ascend_runtime.models.wan.calibrations import COEFFICIENTS, RATIOS, published
from ascend_runtime.models.wan.transformer import _indicator
from ascend_runtime.models.wan.defaults import WAN21_IMAGE, WAN21_TEXT, WAN22_TEXT
from cached_models import RATIOS_OF_STEPS, STEPS, CachedModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.mag_cache import nearest_interp
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from torch.testing import assert_close

FAMILIES = ("wan", "hunyuan")


@pytest.fixture(scope="module")
def wan_model(checkpoints, specs, tmp_path_factory) -> CachedModel:
    folder = shutil.copytree(checkpoints(layers=3), tmp_path_factory.mktemp("step caches") / "model")
    return cached_models.wan(folder, (specs.text(1), specs.text(2)))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, wan_model, tmp_path_factory) -> CachedModel:
    """A model of a family, with a calibration next to it."""
    return wan_model if request.param == "wan" else cached_models.hunyuan(tmp_path_factory.mktemp("hunyuan"))


def ours(runtime, model, guidance=1.0, **spec):
    cache = AccelerationSpec(step_cache=StepCacheSpec(**spec) if spec else None)
    return model.sample(runtime, guidance, acceleration=cache)


@pytest.mark.parametrize("threshold", [0.3, 0.75])
def test_the_first_block_cache_is_diffusers(one_rank, model, threshold):
    expected, left_out = model.theirs(FirstBlockCacheConfig(threshold=threshold))
    made = ours(one_rank, model, method="fbcache", threshold=threshold, last_steps=0)
    facts = made.info["acceleration"]
    assert facts["steps_reusing"] == left_out and (left_out or threshold < 0.5)
    assert facts["blocks_skipped"] == len(left_out) * (model.blocks - 1), "the first block is computed"
    assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)


def test_the_first_block_cache_looks_at_a_known_frame_as_diffusers_does(one_rank, tmp_path):
    model = cached_models.hunyuan(tmp_path, "i2v replace")
    expected, left_out = model.theirs(FirstBlockCacheConfig(threshold=0.5))
    made = ours(one_rank, model, method="fbcache", threshold=0.5, last_steps=0)
    assert made.info["acceleration"]["steps_reusing"] == left_out != []
    assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("threshold, most", [(0.04, 2), (0.08, 3)])
def test_magcache_is_diffusers(one_rank, model, threshold, most):
    config = MagCacheConfig(threshold=threshold, max_skip_steps=most, retention_ratio=0.2, num_inference_steps=STEPS,
                            mag_ratios=list(RATIOS_OF_STEPS))  # fmt: skip
    expected, left_out = model.theirs(config)
    made = ours(one_rank, model, method="magcache", threshold=threshold, most=most, last_steps=0)
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


@pytest.fixture(scope="module")
def dense(one_rank, model):
    return ours(one_rank, model, guidance=3.0)


@pytest.mark.parametrize("method", ["fbcache", "teacache", "magcache", "taylorseer"])
def test_threshold_0_leaves_nothing_out(one_rank, model, dense, method):
    made = ours(one_rank, model, guidance=3.0, method=method, threshold=0.0)
    assert "acceleration" not in dense.info and made.info["acceleration"]["steps_reusing"] == []
    assert torch.equal(made.tensor, dense.tensor)


@pytest.mark.parametrize("method, expected", [
    ("taylorseer", [3, 4, 5, 7, 8, 9]),
    ("magcache", None), ("teacache", None), ("fbcache", None),
])  # fmt: skip
def test_first_and_last_steps_and_those_in_a_row(one_rank, model, method, expected):
    """With a threshold that lets all pass, nothing but these is computed; both branches in the same steps."""
    made = ours(one_rank, model, guidance=3.0, method=method, threshold=100.0)
    default = {"magcache": [step for step in range(2, 11) if step % 3 != 1]}.get(method, list(range(1, 11)))
    facts = made.info["acceleration"]
    assert facts["steps_reusing"] == (expected or default)
    assert facts["blocks_skipped"] == 2 * len(facts["steps_reusing"]) * (model.blocks - (method == "fbcache"))
    made = ours(one_rank, model, guidance=3.0, method=method, threshold=100.0, first_steps=3, last_steps=2, most=2,
                interval=9)  # fmt: skip
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


def test_no_text_is_read_after_the_last_block():
    """So it does not matter whether the kept residual of a chunk includes that of its text."""

    class Scrambling(Pass):
        def blocks(self, stack, tokens):
            out = super().blocks(stack, tokens)
            return torch.cat([out[:, :45], torch.randn_like(out[:, 45:])], 1)

    theirs = random_hunyuan.transformer()
    network, given = random_hunyuan.ours(theirs), random_hunyuan.inputs(theirs.config, text=7)
    with torch.no_grad():
        assert torch.equal(*(random_hunyuan.velocity(network, given, passing) for passing in (Scrambling(), Pass())))


@pytest.mark.parametrize("kind, clean", [("t2v", 0), ("i2v replace", 15)])
def test_hunyuans_indicator_is_the_video_as_the_first_block_modulates_it(kind, clean):
    """As TeaCache takes it from the original's first block: diffusers' norm1, of the tokens that diffusers embeds."""

    class Looking(Pass):
        def blocks(self, stack, tokens):
            self.seen = stack.indicator(tokens, 45)
            return tokens

    theirs = random_hunyuan.transformer(kind)
    given = random_hunyuan.inputs(theirs.config)
    looking, seen = Looking(), {}
    norm = theirs.transformer_blocks[0].norm1
    norm.register_forward_hook(lambda _, given, out: seen.update(video=out[0]))
    with torch.no_grad():
        random_hunyuan.velocity(random_hunyuan.ours(theirs), given, looking)
        random_hunyuan.diffusers_velocity(theirs, given)
    assert seen["video"].shape == (1, 45, 64)
    assert_close(looking.seen, seen["video"], atol=1e-5, rtol=0.0)


# What is known of models


@pytest.mark.parametrize("threshold, most", [(0.1, 1), (0.15, 2)])
def test_hunyuans_polynomial_lets_few_steps_pass(alone, threshold, most):
    """Its least value is 0.052: with TeaCache's threshold 0.1 no two steps in a row are skipped, with 0.15 no three."""
    coefficients = family("hunyuan_video").calibration({}, HUNYUAN_TEXT, 1, "high_noise").coefficients
    assert min(polynomial(coefficients, x / 1e4) for x in range(10_000)) == pytest.approx(0.0521, abs=1e-4)
    left_out = run(TeaCache(threshold, coefficients, 3), [0] + [0.03] * 30)
    assert left_out == [step for step in range(1, 31) if step % (most + 1)]


def test_published_figures_of_hunyuan_are_those_of_text_to_video():
    hunyuan = family("hunyuan_video")
    for pixels, size, ratio in ((960 * 544, "540P", 1.06971), (1280 * 720, "720P", 1.0754)):
        found = hunyuan.calibration({}, HUNYUAN_TEXT, pixels, "high_noise")
        assert found.source == f"published, of HunyuanVideo at {size}" and len(found.coefficients) == 5
        assert len(found.ratios) == 50 and found.ratios[:2] == (1.0, ratio) and min(found.ratios) > 0.75
    for image in (IMAGE_CONCAT, IMAGE_REPLACE):
        found = hunyuan.calibration({}, image, 1280 * 720, "high_noise")
        assert found.coefficients and not found.ratios, "MagCache published none for images"
    assert hunyuan.calibration(random_hunyuan.config(), HUNYUAN_TEXT, 1, "high_noise") == Calibration()


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
    course = generation.Course((1, 16, 1, 8, 8), (1, 8, 8), {}, False, (), AccelerationSpec(), own)
    model = SimpleNamespace(adapters={"high_noise": None}, high_noise=SimpleNamespace(config={}), family=family("wan"),
                            defaults=WAN21_TEXT, pixels_of=math.prod)  # fmt: skip
    assert generation._known(model, course) == own
    model.adapters["low_noise"] = None
    with pytest.raises(ValueError, match="is for high_noise, but the model has high_noise, low_noise. Calibrate"):
        generation._known(model, course)


def copied(model, folder) -> CachedModel:
    return dataclasses.replace(model, folder=shutil.copytree(model.folder, folder))


def test_a_model_of_which_nothing_is_known(one_rank, model, tmp_path):
    unknown = copied(model, tmp_path / "model")
    calibration_file(str(unknown.folder)).unlink()
    told = ours(one_rank, unknown, method="teacache").info["acceleration"]
    assert told["calibration"] == {"high_noise": "nothing is known"}
    halves = Calibration(ratios=(1.0, 0.9), source="published")
    assert [halves.source_for(method) for method in ("magcache", "teacache")] == ["published", "nothing is known"]
    with pytest.raises(ValueError, match="this model has no calibration. Run `python -m ascend_runtime calibrate"):
        ours(one_rank, unknown, method="magcache")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"high_noise": {"ratios": ["a"]}}',
                                     b'{"high_noise": {"coefficients": [1e999]}}'])  # fmt: skip
def test_a_file_that_is_no_calibration(one_rank, wan_model, tmp_path, content):
    broken = copied(wan_model, tmp_path / "model")
    calibration_file(str(broken.folder)).write_bytes(content)
    with pytest.raises(ValueError, match="is not a calibration .* Remove it, or calibrate the model again"):
        ours(one_rank, broken, method="magcache")
