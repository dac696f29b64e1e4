"""The HunyuanVideo VAE on one device: as one plane, and in the published tiles."""

import logging
import math
from itertools import product

import pytest
import small_tiles
import tiny_models
import torch
from ascend_runtime.engine import video
from ascend_runtime.models.hunyuan_video.vae import video_vae
from ascend_runtime.models.shared import tiling
from ascend_runtime.models.shared.overlapping import Cut

WORKS = {"decode": video.decode_video, "encode": video.encode_video}
SIZES = [(1, 5, 7), (2, 3, 11), (4, 2, 3)]  # of a latent [T, H, W]
TILED = [(4, 1, 2), (7, 1, 2), (1, 9, 7), (1, 7, 13), (5, 1, 9)]  # cut in nothing, in time, in space, in both
TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("one_rank_group")


@pytest.fixture(scope="module")
def vaes():
    """diffusers' own, and ours."""
    theirs, ours = (tiny_models.randomise(tiny_models.hunyuan_vae(), 3) for _ in range(2))
    return theirs, tiny_models.on_ranks(ours)


def given_for(work, size, seed=1):
    """A latent [1,16,T,h,w] or a video [T',H,W,3]."""
    generator, (frames, height, width) = torch.Generator().manual_seed(seed), size
    if work == "decode":
        return torch.randn(1, 16, *size, generator=generator)
    return torch.rand(4 * frames - 3, 8 * height, 8 * width, 3, generator=generator)


@torch.no_grad()
def done(vae, work, given, tiles="auto"):
    """(the result, the progress reports, the facts)"""
    if work == "decode":
        batch, _, frames, height, width = given.shape
        shape = (batch * (4 * frames - 3), 8 * height, 8 * width, 3)
    else:
        shape = (1, 16, (len(given) + 3) // 4, *(side // 8 for side in given.shape[1:3]))
    result, reports = torch.full(shape, torch.nan), []
    facts = WORKS[work](vae, given, result, lambda *report: reports.append(report), tiles)
    return result, reports, facts


@torch.no_grad()
def by_diffusers(vae, work, given, tiled=None):
    vae.use_framewise_decoding = vae.use_framewise_encoding = bool(tiled)
    vae.enable_tiling(*tiled) if tiled else vae.disable_tiling()
    if work == "decode":
        return (vae.decode(given).sample.movedim(1, -1).flatten(0, 1) / 2 + 0.5).clamp(0, 1)
    return vae.encode(given.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()


@pytest.mark.parametrize("work, size", [*product(["decode"], SIZES), ("encode", SIZES[0]), ("encode", SIZES[2])])
def test_a_plane_equals_diffusers(vaes, work, size):
    theirs, ours = vaes
    given = given_for(work, size)
    result, reports, facts = done(ours, work, given)
    wanted = by_diffusers(theirs, work, given)
    error = (result - wanted).abs().max().item()
    print(f"{work} of {size}: {error:.1e}")
    assert wanted.std() > 0.05 and error < TOLERANCE
    total = (25 if work == "decode" else 17) + size[0]  # passes over all frames, then frame by frame
    assert reports == [(step, total) for step in range(1, total + 1)] and facts["tiles"] == "1 x 1"


@pytest.mark.parametrize("work, size", [*product(["decode"], TILED), ("encode", TILED[1]), ("encode", TILED[4])])
def test_tiles_equal_diffusers(vaes, monkeypatch, work, size):
    """A quarter as large as published."""
    small_tiles.use(monkeypatch.setattr)
    tiles_equal_diffusers(vaes, work, size, small_tiles.DIFFUSERS)


def test_published_tiles_equal_diffusers(vaes):
    """256 x 256 pixels and 65 frames, blended over 16 frames; in space the numbers are the same."""
    tiles_equal_diffusers(vaes, "decode", (17, 1, 1), small_tiles.PUBLISHED)
    assert video_vae.SPACE == Cut(256 // 8, 192 // 8)


def tiles_equal_diffusers(vaes, work, size, tiles):
    theirs, ours = vaes
    given = given_for(work, size)
    result, reports, facts = done(ours, work, given, tiles="published")
    wanted = by_diffusers(theirs, work, given, tiles)
    error = (result - wanted).abs().max().item()
    print(f"{work} of {size}: {facts['tiles']}: {error:.1e}")
    assert wanted.std() > 0.05 and error < TOLERANCE
    assert reports == [(step, reports[-1][1]) for step in range(1, reports[-1][1] + 1)]


# Which of the two


class Left(Exception):
    pass


@pytest.fixture
def room(monkeypatch):
    """`room(bytes)`: what is free from then on."""
    return lambda free: monkeypatch.setattr(tiling.devices, "room", lambda device: free)


def test_a_plane_if_it_fits_else_tiles(vaes, monkeypatch, room, caplog):
    """By what is free; both are predicted and reported, and with less no work begins."""
    small_tiles.use(monkeypatch.setattr)
    theirs, ours = vaes
    given = given_for("decode", size := (2, 1, 20))
    spare = tiling.margin(ours.device)
    whole, tile = (math.ceil(spare * ours.bytes_needed("decode", *one)) for one in (size, (2, 1, 8)))
    held = 4 * 2 * 8 * 3 * 4 * 64  # one finished tile, on the host
    room(whole)
    with caplog.at_level(logging.INFO):
        result, _, facts = done(ours, "decode", given)
    assert (result - by_diffusers(theirs, "decode", given)).abs().max() < TOLERANCE
    assert facts == {"tiles": "1 x 1", "memory": f"{whole / 1e9:.1f} GB a rank"} and not caplog.records
    room(whole - 1)
    with caplog.at_level(logging.INFO):
        result, _, facts = done(ours, "decode", given)
    wanted = by_diffusers(theirs, "decode", given, small_tiles.DIFFUSERS)
    assert (result - wanted).abs().max() < TOLERANCE
    assert facts["tiles"] == "4 of 64 x 8 pixels and 5 frames, blended"
    assert "4 tiles are used, and blended" in caplog.records[0].getMessage()
    room(tile + held)
    done(ours, "decode", given)
    room(tile + held - 1)
    with pytest.raises(ValueError, match=rf"160 x 8 pixels takes .* in tiles of 64 x 8 pixels.*bfloat16"):
        video.decode_video(ours, given, wanted, lambda *_: pytest.fail("it has begun"))


def test_the_user_can_choose(vaes, monkeypatch, room):
    """And is refused with the numbers."""
    small_tiles.use(monkeypatch.setattr)
    theirs, ours = vaes
    given = given_for("decode", (1, 2, 10))
    assert done(ours, "decode", given, "published")[2]["tiles"].startswith("2 of 64 x 16 pixels")
    assert done(ours, "decode", given, "whole")[2]["tiles"] == "1 x 1"
    needed = tiling.margin(ours.device) * ours.bytes_needed("decode", 1, 2, 10)
    room(int(needed) - 1)
    with pytest.raises(ValueError, match=f"80 x 16 pixels takes {needed / 1e9:.1f} GB, but .* Or set tiles to 'publ"):
        done(ours, "decode", given, "whole")


@pytest.mark.parametrize("tiles", ["whole", "published"])
def test_a_job_that_was_left_does_not_touch_the_next(vaes, monkeypatch, tiles):
    """At any step: between two passes over the frames, or between two tiles."""
    small_tiles.use(monkeypatch.setattr)
    theirs, ours = vaes
    given, frames = given_for("decode", (2, 2, 9)), torch.empty(5, 16, 72, 3)

    def leave(step, total):
        if step == total // 2:
            raise Left

    with pytest.raises(Left), torch.no_grad():
        video.decode_video(ours, torch.full_like(given, 3.0), frames, leave, tiles)
    result, _, _ = done(ours, "decode", given, tiles)
    tiled = small_tiles.DIFFUSERS if tiles == "published" else None
    assert (result - by_diffusers(theirs, "decode", given, tiled)).abs().max() < TOLERANCE


def test_a_value_that_is_not_finite_is_reported_also_of_tiles(vaes, monkeypatch):
    small_tiles.use(monkeypatch.setattr)
    monkeypatch.setattr(vaes[1].network.decoder.conv_out.conv, "bias", torch.nn.Parameter(torch.full((3,), math.inf)))
    with pytest.raises(ValueError, match="The decoded video has NaN or infinite values"):
        done(vaes[1], "decode", given_for("decode", (1, 1, 9)), "published")
