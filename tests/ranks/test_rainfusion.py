"""RainFusion: its orders and masks against plain loops, its attention against dense attention under the same mask, and
jobs of one rank against those of two."""

import math
import random

import pytest
import random_hunyuan
import torch
import torch.nn.functional as F
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.acceleration import masks
from ascend_runtime.acceleration.bricks import bricks, by_frames, by_places, tiles
from ascend_runtime.models.shared.block_stack import At
from ascend_runtime.acceleration.rainfusion import JobSize, RainFusion, version_of
from ascend_runtime.acceleration.tally import Tally
from ascend_runtime.models.cost import BlockWork, Work
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, RainFusionSpec
from ascend_runtime.ops import PlainOperators, sparse
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

SEED = random.randrange(10**6)
ORDERS = {"bricks": bricks, "tiles": tiles, "by_frames": by_frames, "by_places": by_places}
GRIDS = [(1, 3, 5), (2, 1, 1), (3, 8, 8), (4, 16, 24), (5, 9, 17), (6, 20, 8), (2, 7, 31), (9, 8, 13)]


def some_grids(count):
    chosen = random.Random(SEED)
    print(f"seed {SEED}")
    return GRIDS + [(chosen.randint(1, 7), chosen.randint(1, 21), chosen.randint(1, 21)) for _ in range(count)]


# Orders


def spelt_out_bricks(grid):
    """Frame 0 last; before it what fills no brick; before that bricks of two frames, and of one."""
    frames, height, width = grid
    inner = [(t, h, w) for t in range(1, frames) for h in range(height) for w in range(width)]
    paired = 1 + (frames - 1) // 2 * 2

    def key(token):
        t, h, w = token
        if h >= height // 8 * 8:
            return (2, t, h, w)
        if w >= width // 8 * 8:
            return (3, t, h, w)
        if t >= paired:
            return (1, t, h // 8, w // 8, h, w)
        return (0, (t - 1) // 2, h // 8, w // 8, t, h, w)

    first = [(0, h, w) for h in range(height) for w in range(width)]
    return [(t * height + h) * width + w for t, h, w in sorted(inner, key=key) + first]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("text", [0, 7, 300])
def test_an_order_has_each_token_once_and_goes_back(name, text):
    for grid in some_grids(20):
        order, video = ORDERS[name](grid, behind=text), math.prod(grid)
        tokens = video + text
        assert order.tokens.sort().values.tolist() == list(range(tokens)), grid
        x = torch.randn(2, tokens, 3, 4)
        assert torch.equal(order.undo(order.apply(x)), x) and order.apply(x).is_contiguous()
        kept = {place // 128 for place, token in enumerate(order.tokens.tolist())
                if token < grid[1] * grid[2] or token >= video}  # fmt: skip
        assert order.protected.nonzero().flatten().tolist() == sorted(kept)
        assert order.tokens[video:].tolist() == list(range(video, tokens))


def test_a_mask_block_of_bricks_is_2_8_8():
    for grid in some_grids(20):
        assert bricks(grid).tokens.tolist() == spelt_out_bricks(grid), grid
    frames, rows, columns = (4, 16, 24)
    for block in bricks((1 + frames, rows, columns)).tokens[: frames * rows * columns].split(128):
        corners = [(int(number) // (rows * columns), int(number) // columns % rows, int(number) % columns)
                   for number in (block.min(), block.max())]  # fmt: skip
        assert [last - first for first, last in zip(*corners)] == [1, 7, 7]


# Masks


def spelt_out_best(query, key, sparsity, protected):
    """Row by row, of [B, heads, S, head_dim]: the mask, and which rows have no tie at the cut, which rounding turns."""
    starts = range(0, query.shape[2], 128)
    count = len(starts)
    mask, sure = (torch.zeros(*query.shape[:2], count, width, dtype=torch.bool) for width in (count, 1))
    for video in range(query.shape[0]):
        for head in range(query.shape[1]):
            means = [[x[video, head, start : start + 128].double().mean(0) for start in starts] for x in (query, key)]
            for row in range(count):
                scores = [float(means[0][row] @ other) for other in means[1]]
                kept = math.ceil(count * (1 - sparsity))
                ranked = sorted(range(count), key=lambda column: -scores[column])
                chosen, cut = ranked[:kept], ranked[kept - 1 : kept + 1]
                sure[video, head, row] = len(cut) < 2 or scores[cut[0]] - scores[cut[1]] > 1e-6
                for column in range(count):
                    kept = column in chosen or protected[row] or protected[column]
                    mask[video, head, row, column] = bool(kept)
    return mask, sure


def inputs(grid, heads=3, head_dim=16, batch=1, seed=0, text=0):
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(3, batch, math.prod(grid) + text, heads, head_dim, generator=generator).unbind()


@pytest.mark.parametrize("name", ["bricks", "tiles"])
def test_the_best_blocks_are_those_of_plain_loops(name):
    for number, grid in enumerate(some_grids(8)):
        text = (0, 1, 140)[number % 3]
        order = ORDERS[name](grid, behind=text)
        query, key, _ = (order.apply(x) for x in inputs(grid, batch=2, seed=number, text=text))
        sparsity = (0.3, 0.64, 0.9)[number % 3]
        mask = masks.best(query, key, sparsity, order.protected)
        expected, sure = spelt_out_best(query, key, sparsity, order.protected)
        assert sure.float().mean() > 0.9 and torch.equal(mask & sure, expected & sure), grid


def test_the_band_leaves_out_what_it_is_asked_to():
    assert masks.band(10, 0.64, torch.device("cpu")).int().tolist() == [
        [int(abs(row - column) <= 2) for column in range(10)] for row in range(10)
    ]
    for sparsity in (0.3, 0.5, 0.64, 0.8, 0.9):
        assert masks.band(1000, sparsity, torch.device("cpu")).float().mean() == pytest.approx(1 - sparsity, abs=0.02)


@pytest.mark.parametrize("sparsity, published", [(0.5, 0.55), (0.64, 0.42), (0.8, 0.28), (0.9, 0.19)])
def test_the_density_of_720p_x_81_is_the_published_one(sparsity, published):
    grid = (21, 45, 80)
    order = bricks(grid)
    generator = torch.Generator().manual_seed(SEED)
    scores = torch.rand(591, 591, generator=generator)
    kept = scores.topk(masks.kept_of(591, sparsity), dim=-1).indices
    mask = torch.zeros(591, 591, dtype=torch.bool).scatter_(-1, kept, True) | masks.either(order.protected)
    assert int(order.protected.sum()) == 29
    assert float(masks.density(mask, math.prod(grid))) == pytest.approx(published, abs=0.01)


def test_the_density_counts_a_short_last_block_as_what_it_is():
    for length in (1, 127, 128, 129, 500):
        mask = torch.rand(sparse.blocks_of(length), sparse.blocks_of(length)) < 0.5
        assert float(masks.density(mask, length)) == pytest.approx(float(full(mask, length).float().mean()), abs=1e-6)


def full(mask, length):
    """By tokens, of a mask by blocks."""
    return mask.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :length, :length]


def test_a_head_takes_the_band_that_recalls_more_of_its_softmax():
    """Heads whose keys tell the frame, and heads whose keys tell the place."""
    grid = frames, height, width = (8, 12, 16)
    numbers = torch.arange(math.prod(grid))
    of_frame, of_place = numbers // (height * width), numbers % (height * width)
    told = [F.one_hot(of_frame, 192), F.one_hot(of_place, 192), F.one_hot(of_frame, 192)]
    x = torch.stack(told, 1).float()[None] * 40  # [1, S, 3 heads, 192]
    orders = by_frames(grid), by_places(grid)
    band = masks.band(12, 0.64, x.device)
    frames_recalled, places_recalled = masks.recalls(x, x, orders, (band | masks.either(orders[0].protected),) * 2)
    assert (frames_recalled > places_recalled).tolist() == [True, False, True]


# Attention


@pytest.mark.parametrize("compute", [sparse.gathered, lambda *given: sparse.flex(*given, attend=flex_attention)],
                         ids=["gathered", "flex"])  # fmt: skip
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_equals_dense_attention_under_the_mask(compute, dtype, tolerance):
    generator = torch.Generator().manual_seed(SEED)
    print(f"seed {SEED}")
    for length in (5, 128, 300, 640, 1000):
        blocks = sparse.blocks_of(length)
        query, key, value = torch.randn(3, 2, 3, length, 16, generator=generator).to(dtype).unbind()
        mask = torch.rand(2, 3, blocks, blocks, generator=generator) < 0.4
        mask[..., 0] |= ~mask.any(-1)
        mask[:, 1, -1] = True
        expected = F.scaled_dot_product_attention(*(x.float() for x in (query, key, value)), full(mask, length))
        out = compute(query, key, value, mask)
        assert out.dtype == dtype
        assert_close(out.float(), expected, atol=tolerance, rtol=0)


class Spelt(PlainOperators):
    """Dense attention under the mask, which it keeps."""

    def sparse_attention(self, query, key, value, pattern):
        (mask,) = pattern
        self.masks = [*getattr(self, "masks", []), mask]
        return F.scaled_dot_product_attention(query, key, value, full(mask, query.shape[2]))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("text", [0, 1, 140])
def test_a_version_equals_dense_attention_under_its_mask(version, text):
    """Also with a text behind the video, which attends to all and is attended to by all."""
    for number, grid in enumerate(some_grids(4)[text > 0 :: 4 if text else 1]):
        spec = RainFusionSpec(version=version, sparsity=0.8)
        qkv, length = inputs(grid, batch=2, seed=number, text=text), math.prod(grid) + text
        spelt = Spelt()
        expected = version_of(spec, grid, spelt)(*qkv, None)
        found = version_of(spec, grid, PlainOperators())(*qkv, None)
        assert_close(found.out, expected.out, atol=1e-5, rtol=0)
        again = version_of(spec, grid, PlainOperators())(*qkv, found.plan)
        assert torch.equal(again.out, found.out) and again.plan is found.plan
        kept = [full(mask, length) for mask in spelt.masks]
        assert all(mask[..., -text:].all() and mask[..., -text:, :].all() for mask in kept if text)
        shares = torch.cat([mask.float().mean((0, 2, 3)) for mask in kept])
        assert_close(found.plan.density.sort().values, shares.sort().values, atol=1e-6, rtol=0)
        dense = version_of(RainFusionSpec(version=version, sparsity=0), grid, PlainOperators())(*qkv, None)
        assert_close(dense.out, PlainOperators().attention(*qkv), atol=1e-5, rtol=0)
        assert_close(dense.plan.density, torch.ones(3))


# Jobs

SHAPE = (1, 16, 5, 18, 50)  # grid 5 x 9 x 25: 1125 tokens, 9 mask blocks, of which 2 or 3 are protected
STEPS = 4
FAMILIES = ("wan", "hunyuan")


@pytest.fixture(scope="module")
def models(specs, tmp_path_factory):
    """By family: a model, and two prompts for it."""
    folder = random_hunyuan.folder(tmp_path_factory.mktemp("hunyuan"), num_layers=1, num_single_layers=1)
    draw = torch.Generator().manual_seed(2)
    texts = (torch.randn(1, tokens, random_hunyuan.TEXT_DIM, generator=draw) for tokens in (140, 7))
    prompts = [Conditioning(text=text, pooled=torch.randn(1, random_hunyuan.POOLED_DIM, generator=draw))
               for text in texts]  # fmt: skip
    return {
        "wan": (specs.model, specs.text(1), specs.text(2)),
        "hunyuan": (DiffusionModelSpec(path=str(folder)), *prompts),
    }


def sample(runtime, given, rainfusion, parallel=None, shape=SHAPE, warm_up=False, **accelerators):
    """given: of `models`."""
    spec = SampleSpec(seed=11, steps=STEPS, guidance_scale=4.0)
    acceleration = AccelerationSpec(rainfusion=rainfusion, **accelerators)
    model, *prompts = given
    return runtime.sample(model, spec, torch.zeros(shape), *prompts, parallel=parallel, acceleration=acceleration,
                          warm_up=warm_up)  # fmt: skip


SPECS = {
    "v1": RainFusionSpec(version="v1", sparsity=0.8, start=1),
    "v2": RainFusionSpec(version="v2", sparsity=0.8, start=1),
    "v3": RainFusionSpec(version="v3", sparsity=0.8, start=1, refresh=2),
}


@pytest.fixture(scope="module")
def expected(one_rank, models):
    """By family: what one rank makes, dense (None) and by each version."""
    return {
        family: {name: sample(one_rank, given, SPECS.get(name)) for name in (None, *SPECS)}
        for family, given in models.items()
    }


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_job_of_one_rank_is_sparse_from_its_start_on(expected, family, version):
    made, dense = expected[family][version], expected[family][None]
    facts = made.info["acceleration"]
    assert 0.4 < facts["mean_density"] < 0.95 and facts["flops_saved"] > 0.01
    assert facts["predicted_speed_up"] == pytest.approx(1 / (1 - facts["flops_saved"]))
    assert (made.tensor - dense.tensor).abs().max() > 1e-3
    assert "acceleration" not in dense.info


PLANS = {
    "ulysses": {"ulysses_degree": 2},
    "overlapped": {"ulysses_degree": 2, "overlap": True},
    "slices": {"tp_degree": 2},
    "guidance": {"cfg_degree": 2, "fsdp": True},
}
HUNYUAN_SAMPLE = {("v1", "overlapped"), ("v2", "ulysses"), ("v3", "guidance")}


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_make_what_one_makes(two_ranks, models, expected, family, version, plan, pytestconfig):
    if family == "hunyuan" and (version, plan) not in HUNYUAN_SAMPLE:
        if not pytestconfig.getoption("--all-accelerators"):
            pytest.skip("one of those that --all-accelerators runs")
    one = expected[family][version]
    done = sample(two_ranks, models[family], SPECS[version], ParallelSpec(ranks=2, **PLANS[plan]))
    assert_close(done.tensor, one.tensor, atol=1e-4, rtol=0)
    if plan == "guidance":
        density = one.info["acceleration"]["mean_density"]
        assert done.info["acceleration"]["mean_density"] == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ring_is_refused_and_the_ranks_live_on(two_ranks, models, family):
    with pytest.raises(ValueError, match="ring_degree is 2.*ulysses_degree"):
        sample(two_ranks, models[family], SPECS["v2"], ParallelSpec(ranks=2, ring_degree=2))
    assert two_ranks.ping() is not None


DENSE = {
    "sparsity 0": RainFusionSpec(sparsity=0),
    "start after the last step": RainFusionSpec(sparsity=0.8, start=STEPS),
    "no block between the dense ones": RainFusionSpec(sparsity=0.8, start=0, first_blocks=1, last_blocks=1),
}


@pytest.mark.parametrize("family, rainfusion", [
    *(("wan", spec) for spec in DENSE.values()), ("hunyuan", DENSE["no block between the dense ones"]),
], ids=[*DENSE, "hunyuan"])  # fmt: skip
def test_what_leaves_nothing_out_is_dense(one_rank, models, expected, family, rainfusion):
    done = sample(one_rank, models[family], rainfusion)
    assert torch.equal(done.tensor, expected[family][None].tensor)
    assert done.info["acceleration"]["mean_density"] == 1.0 and done.info["acceleration"]["flops_saved"] == 0


def test_what_is_saved_counts_the_text(expected):
    """Of products over [video | text]. Layers of single vectors, a thousandth of the work, are left out here."""
    tokens, text, width = 1125, 140, 64  # the text of both branches counts as the positive one
    length = tokens + text
    products = 2 * 4 * length**2 * width
    blocks = products + 2 * 24 * length * width**2
    patches = 2 * tokens * width * 4 * (16 + 16)
    refiner = 2 * (4 * text**2 * width + 24 * text * width**2) + 2 * text * width * random_hunyuan.TEXT_DIM
    share = products / (blocks + patches + refiner)
    for version in SPECS:
        facts = expected["hunyuan"][version].info["acceleration"]
        left_out = (STEPS - 1) / STEPS * (1 - facts["mean_density"])
        assert facts["flops_saved"] == pytest.approx(left_out * share, rel=5e-3)


def test_attention_that_is_reused_is_not_computed(one_rank, models, expected):
    cache = AttentionCacheSpec(start=1, end=3, interval=3)  # steps 2 and 3 reuse
    done = sample(one_rank, models["wan"], SPECS["v2"], attention_cache=cache).info["acceleration"]
    alone = expected["wan"]["v2"].info["acceleration"]
    assert done["attentions_reused"] == 2 * 2 * 2 and done["steps_reusing"] == [2, 3]
    assert done["flops_saved"] > alone["flops_saved"]


def test_a_mask_is_chosen_anew_also_where_a_cache_leaves_out_the_step_that_would():
    """Masks serve for two steps, from step 0 on; a cache computes the odd ones, so each step finds an older mask."""
    grid, plans = (2, 8, 16), []
    spec = RainFusionSpec(sparsity=0.8, start=0, refresh=2)
    fusion = RainFusion(spec, JobSize(grid, 8, 1), PlainOperators(), Tally(Work((BlockWork(1.0, 1.0, 1.0),), rest=0.0)))
    version, qkv = fusion._version, torch.randn(3, 1, math.prod(grid), 1, 16)
    fusion._version = lambda *given: (plans.append(given[-1] is not None), version(*given))[1]
    for step in (0, 1, 3, 5, 6, 7):
        at = At("high_noise", "cond", step)
        fusion._tally.began(at)
        fusion.attention(at, 0, lambda attend: attend(*qkv))
    assert plans == [False, True, False, False, False, True]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_text_behind_the_video_attends_to_all(version):
    grid, text = (6, 8, 16), 20
    spec = RainFusionSpec(version=version, sparsity=0.9, start=0)
    fusion = RainFusion(spec, JobSize(grid, 8, 1), PlainOperators(), Tally(Work((BlockWork(1.0, 1.0, 1.0),), rest=0.0)))
    print(f"seed {SEED}")
    qkv = torch.randn(3, 2, math.prod(grid) + text, 4, 16, generator=torch.Generator().manual_seed(SEED))
    at = At("high_noise", "cond", 0)
    fusion._tally.began(at)
    made, dense = fusion.attention(at, 0, lambda attend: attend(*qkv)), PlainOperators().attention(*qkv)
    assert_close(made[:, -text:], dense[:, -text:], atol=1e-5, rtol=0.0)
    assert (made - dense)[:, :-text].abs().max() > 0.01


def test_a_warm_up_changes_nothing(one_rank, models, expected):
    done, plain = sample(one_rank, models["wan"], SPECS["v3"], warm_up=True), expected["wan"]["v3"]
    assert torch.equal(done.tensor, plain.tensor)
    assert done.info["acceleration"]["mean_density"] == plain.info["acceleration"]["mean_density"]
