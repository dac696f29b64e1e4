"""What a rank sends in a step is what the docstrings' formulas say, and nothing else."""

import json
from collections import Counter

import gloo_ranks
import pytest
import random_hunyuan
import tiny_models

HEADS, BYTES = 6, 4
LATENT = (1, 16, 3, 6, 10)
TOKENS, TEXT = 3 * 3 * 5, 8
NAMES = {"alltoall_base_": "Ulysses", "send": "ring", "_allgather_base_": "gathers", "allreduce_": "tensor"}
CASES = {
    2: [({"cfg": 2}, {}), ({"ulysses": 2}, {}), ({"ulysses": 2}, {"overlap": True}), ({"ring": 2}, {}),
        ({"ring": 2}, {"ring_exchange": "gather"}), ({"tp": 2}, {})],
    4: [({"cfg": 2, "ulysses": 2}, {}), ({"ring": 2, "ulysses": 2}, {}), ({"cfg": 2, "ring": 2}, {}),
        ({"ulysses": 4}, {}), ({"ring": 4}, {}), ({"ulysses": 2, "tp": 2}, {})],
}  # fmt: skip


class Wan:
    """Two blocks. The text is read by cross-attention."""

    head_dim, blocks, in_sequence = 24, 2, 0

    @staticmethod
    def config():
        return tiny_models.wan_transformer(seed=1, num_attention_heads=HEADS).config

    @classmethod
    def slices(cls, chunk, own, step, tp):
        """(bytes that a rank all-reduces, bytes that it gathers) in a pass. chunk: its tokens, own: those of the video.
        The second step has the text's keys, and so sends nothing for their norms."""
        norms = 3 * chunk + (TEXT if step == 0 else 0)
        return cls.blocks * (3 * chunk * HEADS * cls.head_dim * BYTES + 4 * norms), 0


class HunyuanVideo:
    """Two double blocks and two single ones. The text is the tail of the sequence."""

    head_dim, blocks, in_sequence = 16, 4, TEXT

    @staticmethod
    def config():
        return random_hunyuan.transformer(seed=1, num_attention_heads=HEADS).config

    @classmethod
    def slices(cls, chunk, own, step, tp):
        """A double block sums all tokens twice, a single one once. Each gathers what modulates its streams."""
        width, streams = HEADS * cls.head_dim * BYTES, (own > 0) + (own < chunk)
        return 2 * (2 + 1) * chunk * width, 2 * (6 * streams + 3) * width // tp


FAMILIES = {"wan": Wan, "hunyuan_video": HunyuanVideo}


def formula(family, plan, options, step, rank):
    """Bytes that a rank sends in a guided step, by what sends them: the formulas of parallel/*.py."""
    cfg, ring, ulysses, tp = (plan.get(axis, 1) for axis in ("cfg", "ring", "ulysses", "tp"))
    branches = 2 // cfg
    chunk = -(-(TOKENS + family.in_sequence) // (ring * ulysses))  # tokens of a rank, with padding
    own = min(max(TOKENS - rank // tp % (ring * ulysses) * chunk, 0), chunk)  # of these, the video's
    heads = -(-HEADS // (ulysses * tp))  # of a rank, with padding
    per_head = BYTES * LATENT[0] * family.head_dim
    key_value = 2 * chunk * ulysses * heads * per_head
    velocity = BYTES * LATENT[0] * TOKENS * 4 * LATENT[1]
    sent = Counter()
    attended = branches * family.blocks
    sent["Ulysses"] = attended * 4 * chunk * heads * ulysses * per_head * (ulysses - 1) // ulysses
    travels = "gathers" if options.get("ring_exchange") == "gather" else "ring"
    sent[travels] += attended * (ring - 1) * key_value
    sent["gathers"] += branches * (ring * ulysses - 1) * BYTES * LATENT[0] * chunk * 4 * LATENT[1]
    sent["gathers"] += (cfg - 1) * velocity
    summed, gathered = family.slices(chunk, own, step, tp)
    sent["tensor"] += branches * summed * LATENT[0] * 2 * (tp - 1) // tp
    sent["gathers"] += branches * gathered * LATENT[0] * (tp - 1)
    return sent


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """(family, ranks) -> rank -> case -> step -> [operation, bytes] of each exchange."""
    folder = tmp_path_factory.mktemp("sent")
    for name, family in FAMILIES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(dict(family.config())))
        cases = {ranks: [{"plan": plan, "options": options, "latent": LATENT} for plan, options in given]
                 for ranks, given in CASES.items()}  # fmt: skip
        (folder / name / "cases.json").write_text(json.dumps(cases))
    gloo_ranks.run("counting_rank.py", folder, *CASES, timeout=240)
    return {(name, ranks): [json.loads((folder / name / f"sent-{ranks}-{rank}.json").read_text())
                            for rank in range(ranks)]
            for name in FAMILIES for ranks in CASES}  # fmt: skip


@pytest.mark.parametrize("ranks", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_sends_what_the_formulas_say(counted, family, ranks):
    """To the byte."""
    for rank, cases in enumerate(counted[family, ranks]):
        for (plan, options), steps in zip(CASES[ranks], cases):
            for step, noted in enumerate(steps):
                sent = Counter()
                for operation, sent_bytes in noted:
                    if operation != "recv_":
                        sent[NAMES[operation]] += sent_bytes
                expected = formula(FAMILIES[family], plan, options, step, rank)
                print(f"{family} {plan} {options}, rank {rank}: {dict(sent)}, by formula {dict(expected)}")
                assert {name: sent[name] for name in expected} == expected and set(sent) <= set(expected), plan
