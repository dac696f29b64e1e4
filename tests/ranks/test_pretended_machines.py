"""Ranks that pretend to be on two machines, of three and one: what they know of machines, and how they plan."""

import json

import gloo_ranks
from machines_rank import NAMES


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
