"""The HunyuanVideo VAE on one device: as one plane, and in the published tiles."""

import pytest
import small_tiles
import tiny_models
import torch
from ascend_runtime.engine import video
from ascend_runtime.models.hunyuan_video.vae import video_vae
from ascend_runtime.models.shared.overlapping import Cut

WORKS = {"decode": video.decode_video, "encode": video.encode_video}
SIZES = [(1, 5, 7), (2, 3, 11), (5, 4, 6)]  # of a latent [T, H, W]
TILED = [(5, 3, 2), (4, 2, 3), (7, 2, 2), (1, 9, 7), (2, 7, 13), (6, 2, 9)]  # cut in time, in space, in both
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


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("work", WORKS)
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


@pytest.mark.parametrize("size", TILED, ids=str)
@pytest.mark.parametrize("work", WORKS)
def test_tiles_equal_diffusers(vaes, monkeypatch, work, size):
    """A quarter as large as published."""
    small_tiles.use(monkeypatch.setattr)
    tiles_equal_diffusers(vaes, work, size, small_tiles.DIFFUSERS)


def test_published_tiles_equal_diffusers(vaes):
    """256 x 256 pixels and 65 frames, blended over 16 frames; in space the numbers are the same."""
    tiles_equal_diffusers(vaes, "decode", (17, 2, 1), small_tiles.PUBLISHED)
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
