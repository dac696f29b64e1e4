"""A generation that is asked for every velocity from outside makes the latent of the job, to the bit."""

import json

import gloo_ranks
import pytest

PLANS = {1: [{}], 2: [{"cfg_degree": 2}, {"ulysses_degree": 2, "cfg_degree": 1}, {"ring_degree": 2, "cfg_degree": 1}]}


@pytest.mark.parametrize("ranks", PLANS)
def test_velocities_from_outside_make_the_latent_of_the_job(checkpoint, tmp_path, ranks):
    """With guidance and without, over the plans of so many ranks, with known frames, and with a cache."""
    (tmp_path / "model").symlink_to(checkpoint)
    cases = [
        {"plan": plan, "guidance_scale": scale, "solver": solver, "known": known}
        for plan in PLANS[ranks]
        for scale, solver, known in ((4.0, "unipc", False), (1.0, "euler", False), (4.0, "euler", True))
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    gloo_ranks.run("generation_rank.py", tmp_path, ranks)
    for rank in range(ranks):
        for case, (equal, size) in zip(cases, json.loads((tmp_path / f"equal-{rank}.json").read_text())):
            assert equal and size > 0.1, (rank, case)
