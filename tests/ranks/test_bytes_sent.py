"""What a rank sends in a step is what the docstrings' formulas say, and nothing else."""

import json
from collections import Counter

import gloo_ranks
import pytest
import tiny_models

BLOCKS, HEADS, HEAD_DIM, BYTES = 2, 6, 24, 4
LATENT = (1, 16, 3, 6, 10)
TOKENS, TEXT = 3 * 3 * 5, 8
NAMES = {"alltoall_base_": "Ulysses", "send": "ring", "_allgather_base_": "gathers", "allreduce_": "tensor"}
CASES = {
    2: [({"cfg": 2}, {}), ({"ulysses": 2}, {}), ({"ulysses": 2}, {"overlap": True}), ({"ring": 2}, {}),
        ({"ring": 2}, {"ring_exchange": "gather"}), ({"tp": 2}, {})],
    4: [({"cfg": 2, "ulysses": 2}, {}), ({"ring": 2, "ulysses": 2}, {}), ({"cfg": 2, "ring": 2}, {}),
        ({"ulysses": 4}, {}), ({"ring": 4}, {}), ({"ulysses": 2, "tp": 2}, {})],
}  # fmt: skip


def formula(plan, options, step):
    """Bytes that a rank sends in a guided step, by what sends them: the formulas of parallel/*.py."""
    cfg, ring, ulysses, tp = (plan.get(axis, 1) for axis in ("cfg", "ring", "ulysses", "tp"))
    branches = 2 // cfg
    chunk = -(-TOKENS // (ring * ulysses))  # tokens of a rank, with padding
    heads = -(-HEADS // (ulysses * tp))  # of a rank, with padding
    per_head = BYTES * LATENT[0] * HEAD_DIM
    key_value = 2 * chunk * ulysses * heads * per_head
    velocity = BYTES * LATENT[0] * TOKENS * 4 * LATENT[1]
    sent = Counter()
    sent["Ulysses"] = branches * BLOCKS * 4 * chunk * heads * ulysses * per_head * (ulysses - 1) // ulysses
    travels = "gathers" if options.get("ring_exchange") == "gather" else "ring"
    sent[travels] += branches * BLOCKS * (ring - 1) * key_value
    sent["gathers"] += branches * (ring * ulysses - 1) * BYTES * LATENT[0] * chunk * 4 * LATENT[1]
    sent["gathers"] += (cfg - 1) * velocity
    summed = 3 * chunk * HEADS * HEAD_DIM * BYTES + 4 * (3 * chunk + (TEXT if step == 0 else 0))  # a block
    sent["tensor"] += branches * BLOCKS * summed * LATENT[0] * 2 * (tp - 1) // tp
    return sent


@pytest.mark.parametrize("ranks", CASES)
def test_a_step_sends_what_the_formulas_say(tmp_path, ranks):
    """To the byte; the second step has the text's keys, and so sends nothing for their norms."""
    network = tiny_models.wan_transformer(seed=1, num_attention_heads=HEADS)
    (tmp_path / "config.json").write_text(network.to_json_string())
    cases = [{"plan": plan, "options": options, "latent": LATENT} for plan, options in CASES[ranks]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    for counted in sent_by_ranks(tmp_path, ranks):
        for (plan, options), steps in zip(CASES[ranks], counted):
            for step, noted in enumerate(steps):
                sent = Counter()
                for operation, sent_bytes in noted:
                    if operation != "recv_":
                        sent[NAMES[operation]] += sent_bytes
                expected = formula(plan, options, step)
                print(f"{plan} {options}: {dict(sent)}, by formula {dict(expected)}")
                assert {name: sent[name] for name in expected} == expected and set(sent) <= set(expected), plan


def sent_by_ranks(folder, ranks):
    gloo_ranks.run("counting_rank.py", folder, ranks)
    return [json.loads((folder / f"sent-{rank}.json").read_text()) for rank in range(ranks)]
