"""Our HunyuanVideo network equals diffusers', from which it takes its parameters by name."""

import pytest
import random_hunyuan
import torch
from ascend_runtime.models.hunyuan_video.context import Context
from ascend_runtime.models.hunyuan_video.transformer import HunyuanVideoTransformer
from random_hunyuan import KINDS, diffusers_velocity, inputs, velocity
from torch.testing import assert_close

SIZES = {"odd": (3, 6, 10), "a frame": (1, 2, 2), "more of each": (5, 8, 14)}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def both():
    """`both(kind, ...)`: ours and diffusers' with equal weights."""
    made = {}

    def networks(kind, **changes):
        key = kind, tuple(changes.items())
        if key not in made:
            theirs = random_hunyuan.transformer(kind, seed=3, **changes)
            made[key] = random_hunyuan.ours(theirs), theirs
        return made[key]

    return networks


def relative(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.mark.parametrize("text, size, batch", [
    (1, "odd", 1), (1, "a frame", 2), (7, "more of each", 1), (7, "a frame", 1), (7, "odd", 2), (256, "odd", 1),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_equals_diffusers(both, kind, size, text, batch):
    ours, theirs = both(kind)
    given = inputs(theirs.config, SIZES[size], text, batch)
    expected = diffusers_velocity(theirs, given)
    assert expected.std() > 0.5
    assert_close(velocity(ours, given), expected, **TOLERANCE)


def test_with_heads_patches_and_feed_forwards_of_other_sizes(both):
    """As in core ComfyUI: heads of 128."""
    for changes in (random_hunyuan.AS_CORE, {"mlp_ratio": 3.0, "patch_size_t": 2, "num_refiner_layers": 1}):
        ours, theirs = both("i2v replace", **changes)
        given = inputs(theirs.config, (4, 6, 10))
        assert_close(velocity(ours, given), diffusers_velocity(theirs, given), **TOLERANCE)


def test_without_a_mask_the_text_is_its_prefix(both):
    """Padding that a mask takes out in diffusers changes nothing, whatever it holds."""
    ours, theirs = both("t2v")
    given = inputs(theirs.config, text=7)
    padded = torch.cat([given.text, 5 * torch.randn(1, 4, random_hunyuan.TEXT_DIM)], 1)
    mask = (torch.arange(11) < 7)[None]
    expected = theirs(given.latent, given.timestep, padded, mask, given.pooled, given.guidance, return_dict=False)[0]
    assert_close(velocity(ours, given), expected, **TOLERANCE)


def test_a_pass_may_have_no_embedded_guidance(both):
    ours, theirs = both("t2v")
    plain = random_hunyuan.transformer("t2v", guidance_embeds=False)
    plain.load_state_dict({name: x for name, x in theirs.state_dict().items() if "guidance_embedder" not in name})
    given = inputs(theirs.config)._replace(guidance=None)
    assert_close(velocity(ours, given), diffusers_velocity(plain, given), **TOLERANCE)


@pytest.mark.parametrize("kind", ["t2v", "i2v replace"])
def test_a_pass_may_say_whether_the_first_frame_is_clean(both, kind):
    """The two models have equal shapes: what a file does not say, the job does."""
    ours, theirs = both(kind)
    other = random_hunyuan.transformer("i2v replace" if kind == "t2v" else "t2v")
    other.load_state_dict(theirs.state_dict())
    given = inputs(theirs.config)
    context = Context(given.text, given.pooled, given.guidance, clean=kind == "t2v")
    made = ours(given.latent, given.timestep, context)
    assert_close(made, diffusers_velocity(other, given), **TOLERANCE)
    assert (made - velocity(ours, given)).abs().max() > 0.01


def test_each_input_changes_the_velocity(both):
    ours, _ = both("t2v")
    given = inputs(ours.config)
    before = velocity(ours, given)
    for name in given._fields:
        assert (velocity(ours, given._replace(**{name: getattr(given, name) * 0.9})) - before).abs().max() > 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_to_float32_as_diffusers(both, kind):
    """Both round the embedded guidance of 6 to 6016, in float32 too here; the rest are roundings."""
    ours, theirs = both(kind, num_single_layers=4)
    given = inputs(theirs.config, text=20).to(torch.bfloat16)
    assert given.guidance is None or given.guidance.tolist() == [6016.0]
    exact = diffusers_velocity(theirs, given._replace(**{name: getattr(given, name).float() for name in (
        "latent", "text", "pooled")}))  # fmt: skip
    off = [relative(make(random_hunyuan.in_dtype(network, torch.bfloat16), given), exact)
           for make, network in ((velocity, ours), (diffusers_velocity, theirs))]  # fmt: skip
    print(f"{kind}: ours {off[0]:.4f}, diffusers' {off[1]:.4f} off")
    assert off[0] < 1.1 * off[1] < 0.03


@pytest.mark.parametrize("heads, ratio, degree, says", [
    (24, 4.0, 5, ["tp_degree is 5", "24 heads", "width 12288", "1, 2, 3, 4, 6, 8, 12, 24;"]),
    (24, 4.0, 16, ["tp_degree is 16", "24 heads"]),
    (2, 4.0, 4, ["tp_degree is 4", "2 heads", "width 1024", "1, 2;"]),
])  # fmt: skip
def test_degrees_that_do_not_cut_a_model(heads, ratio, degree, says):
    config = {"num_attention_heads": heads, "mlp_ratio": ratio, "num_layers": 1, "num_single_layers": 1}
    tp = type("Slices", (), {"degree": degree})
    error = str(pytest.raises(ValueError, HunyuanVideoTransformer, config, tp).value)
    assert all(part in error for part in says), error
