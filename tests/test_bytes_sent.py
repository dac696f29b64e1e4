"""What a rank sends in a step is what the docstrings' formulas say, and nothing else."""

import json
from collections import Counter

import gloo_ranks
import pytest
import tiny_models

BLOCKS, HEADS, HEAD_DIM, BYTES = 2, 4, 24, 4
LATENT = (1, 16, 3, 6, 10)
TOKENS = 3 * 3 * 5
NAMES = {"alltoall_base_": "Ulysses", "send": "ring", "_allgather_base_": "gathers"}
CASES = {
    2: [({"cfg": 2}, {}), ({"ulysses": 2}, {}), ({"ulysses": 2}, {"overlap": True}), ({"ring": 2}, {}),
        ({"ring": 2}, {"ring_exchange": "gather"})],
    4: [({"cfg": 2, "ulysses": 2}, {}), ({"ring": 2, "ulysses": 2}, {}), ({"cfg": 2, "ring": 2}, {}),
        ({"ulysses": 4}, {}), ({"ring": 4}, {})],
}  # fmt: skip


def formula(plan, options):
    """Bytes that a rank sends in a guided step, by what sends them: the formulas of parallel/*.py."""
    cfg, ring, ulysses = (plan.get(axis, 1) for axis in ("cfg", "ring", "ulysses"))
    branches = 2 // cfg
    chunk = -(-TOKENS // (ring * ulysses))  # tokens of a rank, with padding
    heads = -(-HEADS // ulysses)  # of a rank, with padding
    per_head = BYTES * LATENT[0] * HEAD_DIM
    key_value = 2 * chunk * ulysses * heads * per_head
    velocity = BYTES * LATENT[0] * TOKENS * 4 * LATENT[1]
    sent = Counter()
    sent["Ulysses"] = branches * BLOCKS * 4 * chunk * heads * ulysses * per_head * (ulysses - 1) // ulysses
    travels = "gathers" if options.get("ring_exchange") == "gather" else "ring"
    sent[travels] += branches * BLOCKS * (ring - 1) * key_value
    sent["gathers"] += branches * (ring * ulysses - 1) * BYTES * LATENT[0] * chunk * 4 * LATENT[1]
    sent["gathers"] += (cfg - 1) * velocity
    return sent


@pytest.mark.parametrize("ranks", CASES)
def test_a_step_sends_what_the_formulas_say(tmp_path, ranks):
    (tmp_path / "config.json").write_text(tiny_models.wan_transformer(seed=1).to_json_string())
    cases = [{"plan": plan, "options": options, "latent": LATENT} for plan, options in CASES[ranks]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    for counted in sent_by_ranks(tmp_path, ranks):
        for (plan, options), noted in zip(CASES[ranks], counted):
            sent = Counter()
            for operation, sent_bytes in noted:
                if operation != "recv_":
                    sent[NAMES[operation]] += sent_bytes
            expected = formula(plan, options)
            print(f"{plan} {options}: {dict(sent)}, by formula {dict(expected)}")
            for name in {*sent, *expected}:
                assert abs(sent[name] - expected[name]) <= 0.05 * expected[name], (plan, name)


def sent_by_ranks(folder, ranks):
    gloo_ranks.run("counting_rank.py", folder, ranks)
    return [json.loads((folder / f"sent-{rank}.json").read_text()) for rank in range(ranks)]
