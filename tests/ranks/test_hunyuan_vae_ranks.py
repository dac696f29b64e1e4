"""The HunyuanVideo VAE on several ranks: as one plane it makes what diffusers makes of the whole, and in the published
tiles the same bits as one rank."""

import json
import random
from itertools import product

import gloo_ranks
import pytest
import small_tiles
import tile_rank
import tiny_models
import torch
from ascend_runtime import VaeSpec
from safetensors.torch import save_file

RANKS, SAMPLE = [1, 2, 3, 4, 5, 6, 7, 8], [1, 3]
PLANES = [(1, 5, 7), (2, 3, 11), (3, 9, 13), (5, 2, 3), (1, 1, 1)]  # of a latent; the last have fewer pixels than 8
TILED = [(5, 9, 7), (8, 7, 3), (1, 15, 9), (7, 13, 20)]  # larger than a small tile
WORKS = ("decode", "encode")


@pytest.fixture(scope="module")
def vae():
    return tiny_models.randomise(tiny_models.hunyuan_vae(), 3)


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
    vae.save_pretrained(folder := tmp_path_factory.mktemp("hunyuan") / "vae")
    return folder


def pytest_generate_tests(metafunc):
    if "ranks" in metafunc.fixturenames:
        metafunc.parametrize("ranks", RANKS if metafunc.config.getoption("--all-tiles") else SAMPLE)


def case(work, size, tiles):
    """What a rank is to do, and the input: a latent or a video."""
    frames, height, width = size
    latent, video = (1, 16, *size), (4 * frames - 3, 8 * height, 8 * width, 3)
    generator = torch.Generator().manual_seed(frames)
    given = torch.randn(latent, generator=generator) if work == "decode" else torch.rand(video, generator=generator)
    shape = video if work == "decode" else latent
    return {"vae": "vae", "work": work, "shape": shape, "grid": None, "tiles": tiles, "small": True}, given


@pytest.fixture(scope="module")
def runs(request, folder):
    """(what was to be done, its input, the results by the number of ranks) of each case; imported once, as importing
    takes longest."""
    every, seed = request.config.getoption("--all-tiles"), random.randrange(2**32)
    print(f"seed {seed}")
    planes = PLANES if every else [PLANES[1], PLANES[-1]]
    tiled = TILED if every else random.Random(seed).sample(TILED[:3], 1)
    cases = [case(work, size, "whole") for work, size in product(WORKS, planes)]
    cases += [case(work, size, "published") for work, size in product(WORKS, tiled)]
    place, groups = folder.parent, RANKS if every else SAMPLE
    (place / "cases.json").write_text(json.dumps([described for described, _ in cases]))
    save_file({str(number): given for number, (_, given) in enumerate(cases)}, place / "inputs.safetensors")
    for ranks in groups:
        (place / str(ranks)).mkdir()
    results = [{ranks: tile_rank.shared(place / str(ranks), number, described["shape"]).fill_(torch.nan)
                for ranks in groups} for number, (described, _) in enumerate(cases)]  # fmt: skip
    gloo_ranks.run("tile_rank.py", place, *groups, timeout=1800)
    return [(*one, made) for one, made in zip(cases, results)]


@torch.no_grad()
def by_diffusers(vae, work, given):
    if work == "decode":
        return (vae.decode(given).sample[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1)
    return vae.encode(given.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()


def test_a_plane_over_ranks_equals_diffusers(vae, runs, ranks):
    """In fp32, to 1e-4: odd sizes, one frame, more ranks than pixels."""
    for described, given, results in runs:
        if described["tiles"] == "whole":
            error = (results[ranks] - by_diffusers(vae, described["work"], given)).abs().max().item()
            print(f"{ranks} ranks, {described['work']} of {list(given.shape)}: {error:.1e}")
            assert error < 1e-4, described


def test_published_tiles_have_the_same_bits_on_any_number_of_ranks(runs, ranks):
    """Those of one rank are diffusers' by a test in models/test_hunyuan_vae.py."""
    for described, _, results in runs:
        if described["tiles"] == "published":
            assert torch.equal(results[ranks], results[1]) and results[1].std() > 0.05, described


class Left(Exception):
    pass


@pytest.mark.parametrize("tiles", ["whole", "published"])
def test_a_job_is_cancelled_within_a_step_and_the_next_is_as_if_it_had_not_been(two_ranks, vae, folder, tiles):
    """Between two passes over all frames; on the same ranks, with the same weights."""
    spec = VaeSpec(path=str(folder), tiles=tiles)
    latent = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    two_ranks.decode(spec, latent)
    pids, seen = two_ranks.pids, []

    def leave(stage, step, total):
        seen.append((stage, step, total))
        if len(seen) == 3:
            raise Left

    with pytest.raises(Left):
        two_ranks.decode(spec, latent.repeat(4, 1, 1, 1, 1), on_progress=leave)
    assert seen[:3] == [("decode", step, 4 * (27 if tiles == "whole" else 26)) for step in (1, 2, 3)], "no loading"
    done = two_ranks.decode(spec, latent)
    assert two_ranks.pids == pids and (done.tensor - by_diffusers(vae, "decode", latent)).abs().max() < 1e-4
    assert done.info["tiles"] == {"whole": "1 x 2", "published": "1 of 32 x 24 pixels and 5 frames, blended"}[tiles]
    stages = set()
    two_ranks.decode(VaeSpec(path=str(folder)), latent, on_progress=lambda stage, *_: stages.add(stage))
    assert stages == {"decode"}, "the weights are those that are loaded"
