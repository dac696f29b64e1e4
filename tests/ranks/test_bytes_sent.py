"""What a rank sends in a step is what the planner predicts, and nothing else."""

import json
from collections import Counter

import gloo_ranks
import pytest
import random_hunyuan
import tiny_models
from ascend_runtime.models.family import TRANSFORMER
from ascend_runtime.models.registry import family
from ascend_runtime.planner.exchange import Step, exchanges
from ascend_runtime.planner.facts import Arrangement, Network
from ascend_runtime.specs import Plan

HEADS = 6
LATENT = (1, 16, 3, 6, 10)
TEXT = 8
OPERATIONS = {
    "alltoall_base_": "all_to_all", "send": "send", "_allgather_base_": "all_gather", "allreduce_": "all_reduce",
}  # fmt: skip
CASES = {
    2: [({"cfg": 2}, {}), ({"ulysses": 2}, {}), ({"ulysses": 2}, {"overlap": True}), ({"ring": 2}, {}),
        ({"ring": 2}, {"ring_exchange": "gather"}), ({"tp": 2}, {}), ({"ulysses": 2}, {"fsdp": True})],
    4: [({"cfg": 2, "ulysses": 2}, {}), ({"ring": 2, "ulysses": 2}, {}), ({"cfg": 2, "ring": 2}, {}),
        ({"ulysses": 4}, {}), ({"ring": 4}, {}), ({"ulysses": 2, "tp": 2}, {}),
        ({"ulysses": 2, "tp": 2}, {"fsdp": True})],
}  # fmt: skip


CONFIGS = {
    "wan": lambda: tiny_models.wan_transformer(seed=1, num_attention_heads=HEADS).config,
    "hunyuan_video": lambda: random_hunyuan.transformer(seed=1, num_attention_heads=HEADS).config,
}


def predicted(name, config, plan, options, step, rank):
    """(bytes that a rank sends in a guided step, by operation; the number of these operations), as the planner predicts
    them."""
    shapes = {key: tuple(x.shape) for key, x in family(name).network(TRANSFORMER, config).named_parameters()}
    arrangement = Arrangement(plan=Plan(**plan), **options)
    network = Network(part=TRANSFORMER, config=config, shapes=shapes)
    found, times = Counter(), Counter()
    for exchange in exchanges(Step(family(name), network, "float32", LATENT, TEXT, arrangement, again=step > 0,
                                   rank=rank)):  # fmt: skip
        found[exchange.operation] += exchange.sent
        times[exchange.operation] += exchange.times
    return found, times


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """(family, ranks) -> rank -> case -> step -> [operation, bytes] of each exchange."""
    folder = tmp_path_factory.mktemp("sent")
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(dict(config())))
        cases = {ranks: [{"plan": plan, "options": options, "latent": LATENT} for plan, options in given]
                 for ranks, given in CASES.items()}  # fmt: skip
        (folder / name / "cases.json").write_text(json.dumps(cases))
    gloo_ranks.run("counting_rank.py", folder, *CASES, timeout=240)
    return {(name, ranks): [json.loads((folder / name / f"sent-{ranks}-{rank}.json").read_text())
                            for rank in range(ranks)]
            for name in CONFIGS for ranks in CASES}  # fmt: skip


@pytest.mark.parametrize("ranks", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_sends_what_the_planner_predicts(counted, name, ranks):
    """To the byte."""
    config = dict(CONFIGS[name]())
    for rank, cases in enumerate(counted[name, ranks]):
        for (plan, options), steps in zip(CASES[ranks], cases):
            for step, noted in enumerate(steps):
                sent, times = Counter(), Counter()
                for operation, sent_bytes in noted:
                    if operation != "recv_":
                        sent[OPERATIONS[operation]] += sent_bytes
                        times[OPERATIONS[operation]] += 1
                expected, exchanged = predicted(name, config, plan, options, step, rank)
                print(f"{name} {plan} {options}, rank {rank}: {dict(sent)}, predicted {dict(expected)}")
                assert sent == expected, plan
                del times["send"], exchanged["send"]  # several sends are one exchange
                assert times == exchanged, plan
