"""Ranks that pretend to be on two machines, of three and one: what they know of machines, and how they plan."""

import json
from itertools import product

import gloo_ranks
import pytest
import tile_rank
import tiny_models
import torch
from machines_rank import NAMES
from safetensors.torch import save_file

FRAMES = {"decode": (1, 16, 5, 9, 7), "encode": (17, 72, 56, 3)}  # of what a VAE reads; larger than a small tile


def test_ranks_on_two_machines_count_memory_and_plan_for_both(checkpoint, tmp_path):
    """Memory is counted by machine, and alike on all ranks; the link between machines is measured; without guidance,
    the ranks of the cfg axis join a ring, as Ulysses would cross machines; a plan that does is warned of."""
    (tmp_path / "model").symlink_to(checkpoint)
    gloo_ranks.run("machines_rank.py", tmp_path, len(NAMES), pretended_machines=NAMES)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(len(NAMES))]
    assert all(one["link"] == found[0]["link"] for one in found)
    rank_byte, machine_byte, first = found[0]["link"]
    assert 0 < machine_byte <= rank_byte < 1e-6 and 0 < first < 1
    assert all(one["joined"] == {"cfg": 1, "ring": 2, "ulysses": 2} for one in found)
    assert all(one["whole"] == {"cfg": 1, "ring": 1, "ulysses": 4} for one in found)
    warning, line = found[0]["warning"], found[0]["line"]
    assert warning.startswith("Ulysses 4 crosses machines: the plan sends ") and "at the measured" in warning
    assert "would send" in warning and "a step between machines" in line


def test_tiles_of_a_vae_are_those_of_one_machine(request, tmp_path):
    """In one plane, and in published tiles, which overlap with those of the other machine."""
    if not request.config.getoption("--all-machines"):
        pytest.skip("needs --all-machines")
    tiny_models.randomise(tiny_models.hunyuan_vae(), 3).save_pretrained(tmp_path / "vae")
    given = {work: torch.rand(shape, generator=torch.Generator().manual_seed(1)) for work, shape in FRAMES.items()}
    cases = [{"vae": "vae", "work": work, "shape": FRAMES["encode" if work == "decode" else "decode"], "grid": None,
              "tiles": tiles, "small": True} for work, tiles in product(given, ("whole", "published"))]  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    inputs = {str(number): given[case["work"]].clone() for number, case in enumerate(cases)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    for folder in (str(len(NAMES)), "1"):
        for name in ("", *NAMES):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
    gloo_ranks.run("tile_rank.py", tmp_path, 1)
    gloo_ranks.run("tile_rank.py", tmp_path, len(NAMES), pretended_machines=NAMES)
    for number, case in enumerate(cases):
        one, several = (tile_rank.shared(tmp_path / ranks, number, case["shape"]) for ranks in ("1", str(len(NAMES))))
        error = (one - several).abs().max()
        print(f"{case['work']}, {case['tiles']}: {error:.1e}")
        assert one.std() > 0.05 and error < 1e-4, case
