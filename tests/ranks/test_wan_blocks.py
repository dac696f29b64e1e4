"""Our Wan blocks and block stack equal diffusers', from which they take their parameters by name."""

import gloo_ranks
import pytest
import tiny_models
import torch
from ascend_runtime.models.wan.cost import MAX_TOKEN_RATIO
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
IMAGE_DIM, IMAGE_TOKENS, TEXT_TOKENS = 40, 257, 512

CONFIGS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 96},
    "first-last-frame": {
        "in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 96, "pos_embed_seq_len": 2 * IMAGE_TOKENS
    },
    "no cross-attention norm": {"cross_attn_norm": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ours_and_theirs(config):
    theirs = tiny_models.wan_transformer(seed=1, **CONFIGS[config])
    ours = WanTransformer(dict(theirs.config))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert not missing and not unexpected
    return ours.eval(), theirs


def inputs(config, *, per_token, batch=2, frames=3, height=6, width=10):
    """latent, timestep, text and image of this config, from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tokens = frames * (height // 2) * (width // 2)
    latent = draw(batch, CONFIGS[config].get("in_channels", 16), frames, height, width)
    timestep = torch.rand(batch, *((tokens,) if per_token else ()), generator=generator) * 1000
    images = CONFIGS[config].get("pos_embed_seq_len", IMAGE_TOKENS) // IMAGE_TOKENS
    image = draw(batch * images, IMAGE_TOKENS, IMAGE_DIM) if "image_dim" in CONFIGS[config] else None
    return latent, timestep, draw(batch, TEXT_TOKENS, tiny_models.TEXT_DIM), image


@pytest.mark.parametrize("per_token", [False, True], ids=["one timestep", "a timestep a token"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_stack_equals_diffusers(config, per_token):
    ours, theirs = ours_and_theirs(config)
    latent, timestep, text, image = inputs(config, per_token=per_token)
    expected = theirs(latent, timestep, text, encoder_hidden_states_image=image, return_dict=False)[0]
    assert expected.std() > 0.1
    assert_close(tiny_models.velocity(ours, latent, timestep, text, image), expected, **TOLERANCE)


@pytest.mark.parametrize("per_token", [False, True], ids=["one timestep", "a timestep a token"])
@pytest.mark.parametrize("config", ["t2v", "i2v", "no cross-attention norm"])
def test_a_block_equals_diffusers(config, per_token):
    ours, theirs = ours_and_theirs(config)
    latent, _, text, image = inputs(config, per_token=per_token)
    _, _, frames, height, width = latent.shape
    tokens, dim = frames * height * width // 4, 96
    x, text = torch.randn(2, tokens, dim), torch.randn(2, TEXT_TOKENS, dim)
    image = None if image is None else torch.randn(2, IMAGE_TOKENS, dim)
    timestep = torch.randn(2, *((tokens,) if per_token else ()), 6, dim)
    context = text if image is None else torch.cat([image, text], dim=1)
    expected = theirs.blocks[0](x, context, timestep, theirs.rope(latent))
    own = Context(text, image)
    own.embedded = text, image
    got = ours.blocks[0](x, own, timestep, ours._rotary_table(latent))
    assert (expected - x).std() > 0.1
    assert_close(got, expected, **TOLERANCE)


def test_a_timestep_a_token_on_two_ranks(tmp_path):
    """Each rank holds a chunk of the tokens, and of their timesteps; the last chunk is padded."""
    ours, theirs = ours_and_theirs("t2v")
    latent, timestep, text, _ = inputs("t2v", per_token=True)
    assert timestep.shape[1] % 2 == 1
    (tmp_path / "config.json").write_text(theirs.to_json_string())
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    save_file({"latent": latent, "timestep": timestep, "text": text}, tmp_path / "inputs.safetensors")
    gloo_ranks.run("wan_rank.py", tmp_path, 2)
    expected = tiny_models.velocity(ours, latent, timestep, text)
    for rank in range(2):
        assert_close(load_file(tmp_path / f"{rank}.safetensors")["velocity"], expected, atol=1e-5, rtol=0.0)


def test_the_stack_sees_each_of_its_inputs():
    ours, _ = ours_and_theirs("i2v")
    arguments = list(inputs("i2v", per_token=False))
    before = tiny_models.velocity(ours, *arguments)
    for place in range(len(arguments)):
        changed = list(arguments)
        changed[place] = changed[place].flip(-1) + (100.0 if place == 1 else 0.0)
        difference = (tiny_models.velocity(ours, *changed) - before).abs().max().item()
        assert difference > 1e-3, f"input {place} has no influence"


def test_a_new_size_gets_a_new_rotary_table():
    ours, theirs = ours_and_theirs("t2v")
    for size in ({"height": 6, "width": 10}, {"height": 10, "width": 6}, {"frames": 5, "batch": 1}):
        latent, timestep, text, _ = inputs("t2v", per_token=False, **size)
        expected = theirs(latent, timestep, text, return_dict=False)[0]
        assert_close(tiny_models.velocity(ours, latent, timestep, text), expected, **TOLERANCE)


@pytest.mark.parametrize("config", ["t2v", "i2v", "first-last-frame"])
@pytest.mark.parametrize("few", [True, False], ids=["few tokens", "many tokens"])
def test_a_prompt_is_projected_once_where_that_is_felt(config, few):
    """Later passes find keys and values where the video's tokens are few beside the text's; no bit changes."""
    ours, _ = ours_and_theirs(config)
    latent, timestep, text, image = inputs(config, per_token=False)
    tokens = latent[0, 0].numel() // 4
    text = text[:, : tokens // MAX_TOKEN_RATIO + (1 if few else -1)]
    context, passes = Context(text, image), []
    embedder, attention = ours.condition_embedder, ours.blocks[1].attn2
    embedder.text_embedder.linear_1.register_forward_hook(lambda _, x, __: passes.append(x[0].shape[1]))
    once = [] if image is None else [embedder.image_embedder]
    often = [attention.to_k, attention.to_v, *([] if image is None else [attention.add_k_proj, attention.add_v_proj])]
    for layer in (*once, *often):
        layer.register_forward_hook(lambda layer, *_: passes.append(layer))
    for step in (1, 2, 3):
        passes.clear()
        again = ours(latent * step, timestep / step, context)
        first, *layers = passes
        assert first == (text.shape[1] if step == 1 else 1)
        assert set(layers) == {*(once if step == 1 else []), *([] if few and step > 1 else often)}
        assert torch.equal(again, ours(latent * step, timestep / step, Context(text, image)))
