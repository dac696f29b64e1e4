"""A VAE on one device with little memory: tiles that are blended, as diffusers' are; when, and what is said of it."""

import logging

import pytest
import tiny_models
import torch
from ascend_runtime.engine import video
from ascend_runtime.models.shared import tiling
from ascend_runtime.models.wan.vae import streamed as wan_vae, blended as wan_vae_blended

VAES = {"2.1": (tiny_models.wan_vae, 16, 8), "2.2": (tiny_models.wan22_vae, 48, 16)}  # maker, channels, pixels
WORKS = {"decode": video.decode_video, "encode": video.encode_video}
SIZE, STRIDE = 64, 48  # of tiles, for which small videos are large
CASES = {  # pixels of a video that takes 2 x 3 tiles, the last ones slivers; and of a tile
    ("2.1", "decode"): ((56, 104), 64),
    ("2.1", "encode"): ((56, 104), 64),
    ("2.2", "decode"): ((64, 112), 64),
    ("2.2", "encode"): ((112, 208), 128),  # which is tiled in patches of 2 x 2
}
TILES = 6
TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("one_rank_group")


@pytest.fixture(scope="module")
def vaes():
    """By name: diffusers' own, which tiles, and ours."""
    made = {}
    for name, (make, _, _) in VAES.items():
        theirs, ours = (tiny_models.randomise(make(seed=1), 3) for _ in range(2))
        theirs.enable_tiling(SIZE, SIZE, STRIDE, STRIDE)
        made[name] = theirs, tiny_models.on_ranks(ours)
    return made


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(wan_vae_blended, "SIZE", SIZE)
    monkeypatch.setattr(wan_vae_blended, "STRIDE", STRIDE)


@pytest.fixture
def room(monkeypatch):
    """`room(bytes)`: what is free from then on."""
    return lambda free: monkeypatch.setattr(tiling.devices, "room", lambda device: free)


def given_for(name, work, size, frames=2, batch=1):
    """A latent [B,C,T,h,w] or a video [T',H,W,3] of this size in pixels."""
    _, channels, pixels = VAES[name]
    generator = torch.Generator().manual_seed(frames)
    if work == "decode":
        return torch.randn(batch, channels, frames, *(side // pixels for side in size), generator=generator)
    return torch.rand(4 * frames - 3, *size, 3, generator=generator)


@torch.no_grad()
def done(name, vae, work, given):
    """What our VAE makes of it, and what it told of its progress."""
    _, channels, pixels = VAES[name]
    if work == "decode":
        batch, _, frames, *size = given.shape
        shape = (batch * (4 * frames - 3), *(pixels * side for side in size), 3)
    else:
        shape = (1, channels, (len(given) + 3) // 4, *(side // pixels for side in given.shape[1:3]))
    result, told = torch.full(shape, torch.nan), []
    WORKS[work](vae, given, result, lambda *news: told.append(news))
    return result, told


@torch.no_grad()
def by_diffusers(vae, work, given):
    if work == "decode":
        return vae.decode(given).sample.movedim(1, -1).flatten(0, 1) / 2 + 0.5
    return vae.encode(given.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()


def needed(vae, name, work, size):
    """Bytes, with the margin, for tiles of this size in pixels."""
    size = (side // VAES[name][2] for side in size)
    return tiling.margin(vae.device) * wan_vae.bytes_needed(vae.network, work, *size)


@pytest.mark.parametrize("name, work", CASES)
def test_blended_tiles_equal_diffusers(vaes, small_tiles, room, name, work):
    theirs, ours = vaes[name]
    size, tile = CASES[name, work]
    room(needed(ours, name, work, [min(side, tile) for side in size]))  # and not a byte more
    given = given_for(name, work, size)
    result, told = done(name, ours, work, given)
    wanted = by_diffusers(theirs, work, given)
    error = (result - wanted).abs().max().item()
    print(f"Wan {name} {work} of {size}: {error:.1e}")
    assert wanted.std() > 0.05 and error < TOLERANCE
    assert told == [(frame, 2 * TILES) for frame in range(1, 2 * TILES + 1)]  # each tile has 2 latent frames


def test_sizes_are_those_of_diffusers():
    for name, (make, _, _) in VAES.items():
        vae = make()
        assert {vae.tile_sample_min_height, vae.tile_sample_min_width} == {wan_vae_blended.SIZE}, name
        assert {vae.tile_sample_stride_height, vae.tile_sample_stride_width} == {wan_vae_blended.STRIDE}, name


def test_videos_of_a_batch_are_told_apart(vaes, small_tiles, room):
    theirs, ours = vaes["2.1"]
    given = given_for("2.1", "decode", (16, 72), frames=1, batch=2)
    room(needed(ours, "2.1", "decode", (16, SIZE)))
    result, told = done("2.1", ours, "decode", given)
    assert (result - by_diffusers(theirs, "decode", given)).abs().max() < TOLERANCE
    assert told == [(frame, 4) for frame in range(1, 5)]  # 2 videos, 2 tiles, 1 frame


@pytest.mark.parametrize("work", WORKS)
def test_chosen_when_and_only_when_the_whole_does_not_fit(vaes, small_tiles, room, caplog, work):
    """And said then. The whole differs from its tiles, which do not see each other."""
    theirs, ours = vaes["2.1"]
    size = (40, 80)
    given, whole = given_for("2.1", work, size), needed(ours, "2.1", work, size)
    theirs.disable_tiling()
    exact = by_diffusers(theirs, work, given)
    theirs.enable_tiling()
    room(whole)
    assert (done("2.1", ours, work, given)[0] - exact).abs().max() < TOLERANCE
    assert not caplog.records
    room(whole - 1)
    assert (done("2.1", ours, work, given)[0] - exact).abs().max() > 10 * TOLERANCE
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    task = f"To {work} 80 x 40 pixels takes {whole / 1e9:.1f} GB, but {(whole - 1) / 1e9:.1f} GB are free"
    assert task in record.getMessage() and "small tiles are used, and blended" in record.getMessage()


@pytest.mark.parametrize("name, work", CASES)
def test_refused_where_small_tiles_do_not_fit_either(vaes, room, monkeypatch, name, work):
    """By figures of a size that nobody computes here."""
    _, ours = vaes[name]
    size, tile = (6144, 8192), 2048 * CASES[name, work][1] // SIZE
    monkeypatch.setattr(wan_vae_blended, "SIZE", 2048)
    whole, small = (needed(ours, name, work, pixels) for pixels in (size, (tile, tile)))
    room(small - 1)
    _, channels, pixels = VAES[name]
    latent = torch.empty(1, channels, 1, *(side // pixels for side in size))
    frames = torch.empty(1, *size, 3)
    with pytest.raises(ValueError) as error:
        given, made = (latent.zero_(), frames) if work == "decode" else (frames, latent)
        WORKS[work](ours, given, made, lambda *_: pytest.fail("it has begun"))
    says = [f"To {work} 8192 x 6144 pixels takes {whole / 1e9:.1f} GB", f"in small tiles {small / 1e9:.1f} GB",
            f"but {(small - 1) / 1e9:.1f} GB are free", "Ascend Free Memory", "bfloat16"]  # fmt: skip
    assert small > 1e9
    assert not [words for words in says if words not in str(error.value)], error.value


@torch.no_grad()
def test_chosen_by_the_user_also_where_the_whole_fits(vaes, small_tiles):
    theirs, ours = vaes["2.1"]
    given, frames = given_for("2.1", "decode", (16, 72), frames=1), torch.empty(1, 16, 72, 3)
    facts = video.decode_video(ours, given, frames, lambda *_: None, "published")
    assert facts["tiles"] == "2 in turn" and (frames - by_diffusers(theirs, "decode", given)).abs().max() < TOLERANCE
    facts = video.decode_video(ours, given, frames, lambda *_: None, "whole")
    assert facts["tiles"] == "1 x 1"


def test_refused_where_there_are_no_such_tiles(vaes, monkeypatch):
    _, ours = vaes["2.1"]
    monkeypatch.setattr(ours, "blend", lambda: None)
    with pytest.raises(ValueError, match="tiles is 'published', but this VAE has no such tiles. Set it to 'auto'"):
        tiling.tiling_for(ours, "decode", 1, 2, 2, "published")
