"""What ranks exchange can be exchanged over HCCL: by a ledger of each rank on Gloo (helpers/ledger.py)."""

import json
from collections import Counter

import gloo_ranks
import pytest
import random_hunyuan
from ascend_runtime.ops.card_rules import SERIES
from ledger import BATCH, faults, forbidden

SMALL = {"height": 2, "width": 2}  # a latent's: two of three ranks have a tile
JOBS = {
    2: [{"work": "sample", "cfg_degree": 2}, {"work": "sample", "cfg_degree": 1, "ulysses_degree": 2, "overlap": True},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "ring_exchange": "gather", "fsdp": True},
        {"work": "sample", "cfg_degree": 1, "tp_degree": 2}, {"work": "encode"},
        {"work": "sample_hunyuan", "tp_degree": 2}],
    3: [{"work": "decode", **SMALL}, {"work": "sample", "cfg_degree": 1, "ring_degree": 3},
        {"work": "encode_video", **SMALL}, {"work": "decode", "height": 3, "width": 5},
        {"work": "decode_hunyuan", **SMALL}],
    4: [{"work": "sample", "cfg_degree": 2, "ulysses_degree": 2, "fsdp": True},
        {"work": "sample", "guidance_scale": 1.0, "cfg_degree": 2, "ulysses_degree": 2, "fsdp": True},
        {"work": "decode", "height": 2, "width": 2},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "ulysses_degree": 2},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "tp_degree": 2, "fsdp": True},
        {"work": "sample_hunyuan", "ring_degree": 2, "ulysses_degree": 2, "fsdp": True}],
    5: [{"work": "decode", "height": 8, "width": 8}],
}  # fmt: skip
# After each of these jobs: for cfg, Ulysses and FSDP; for all ranks; no more, twice; for FSDP over two ranks; no more.
COMMUNICATORS = {4: [3, 4, 4, 4, 5, 5]}
PLANTED = {"work": "decode", **SMALL, "unnamed": True}


@pytest.fixture(scope="module")
def ledgers(checkpoint, tmp_path_factory):
    """Ranks -> rank -> job -> its entries, and the communicators after it. The last job of three ranks is planted."""
    folder = tmp_path_factory.mktemp("ledgers")
    (folder / "model").symlink_to(checkpoint)
    (folder / "hunyuan").mkdir()
    random_hunyuan.folder(folder / "hunyuan")
    (folder / "cases.json").write_text(json.dumps(JOBS | {3: [*JOBS[3], PLANTED]}))
    gloo_ranks.run("ledger_rank.py", folder, *JOBS, timeout=300)
    return {ranks: [json.loads((folder / f"ledger-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
            for ranks in JOBS}  # fmt: skip


@pytest.mark.parametrize("ranks", JOBS)
def test_ranks_exchange_what_hccl_can(ledgers, ranks):
    """One job after the other, on groups that earlier jobs have made."""
    entries = [sum((job["entries"] for job in jobs[: len(JOBS[ranks])]), []) for jobs in ledgers[ranks]]
    assert not faults(entries)
    for card in SERIES:
        assert not forbidden(entries, card)


@pytest.mark.parametrize("ranks", JOBS)
def test_a_group_that_exchanges_is_counted_and_no_other_is_made(ledgers, ranks):
    for rank, jobs in enumerate(ledgers[ranks]):
        noted, numbers = Counter(), []
        for given, job in zip(JOBS[ranks], jobs):
            exchanges = [entry for entry in job["entries"] if not entry["control"]]
            noted.update(entry["group"] for entry in exchanges)
            numbers.append(job["communicators"])
            does = ", ".join(sorted({entry["does"] for entry in exchanges}))
            print(f"{given}, rank {rank}: {len(exchanges)} exchanges ({does}); {numbers[-1]} communicators")
            assert numbers[-1] == len(noted) and min(noted.values(), default=2) > 1  # one exchange is its first
        assert numbers == COMMUNICATORS.get(ranks, numbers)


def test_a_batch_of_all_ranks_in_which_one_takes_no_part_is_seen(ledgers):
    """Planted: tiles on two of three ranks exchange without naming their group."""
    found = faults([jobs[-1]["entries"] for jobs in ledgers[3]])
    assert f"the first exchange of [0, 1, 2] is {BATCH} without [2]" in found
    assert {f"rank {rank} sends or receives without naming a group" for rank in (0, 1)} < set(found)


def reduced(size=4, group="g", members=(0, 1), **changes):
    entry = {"group": group, "members": list(members), "does": "all_reduce", "bytes": [size], "control": False}
    return {**entry, "dtypes": ["float32"], **changes}


def batch(sends=(), receives=(), members=(0, 1, 2), group="g"):
    pairs = {"sends": [list(pair) for pair in sends], "receives": [list(pair) for pair in receives]}
    return {"group": group, "members": list(members), "does": BATCH, "named": True, "control": False, **pairs}


CONNECTED = reduced(members=(0, 1, 2))


@pytest.mark.parametrize("entries, says", [
    ([[reduced()], [reduced()]], None),
    ([[reduced()], [reduced(8)]], "wait for each other"),
    ([[reduced()], []], "wait for each other"),
    ([[reduced(group="a"), reduced(group="b")], [reduced(group="b"), reduced(group="a")]], "wait for each other"),
    ([[batch([(1, 4)])], [batch(receives=[(0, 4)])], []], f"first exchange of [0, 1, 2] is {BATCH} without [2]"),
    ([[CONNECTED, batch([(1, 4)])], [CONNECTED, batch(receives=[(0, 4)])], [CONNECTED]], None),
    ([[CONNECTED, batch([(1, 4)])], [CONNECTED, batch(receives=[(0, 8)])], [CONNECTED]], "wait for each other"),
    ([[CONNECTED, batch([(1, 4)])], [CONNECTED], [CONNECTED]], "wait for each other"),
    ([[CONNECTED, batch([(1, 4), (1, 8)])], [CONNECTED, batch(receives=[(0, 8), (0, 4)])], [CONNECTED]], "wait for"),
    ([[CONNECTED, batch([(1, 4)])], [CONNECTED, batch(receives=[(0, 4)], group="h")], [CONNECTED]], "wait for"),
    ([[batch([(1, 4)], [(2, 4)])], [batch([(2, 4)], [(0, 4)])], [batch([(0, 4)], [(1, 4)])]], None),
    ([[reduced(does="send")], [reduced(does="send")]], "rank 0 has a send outside of a batch"),
])  # fmt: skip
def test_what_a_ledger_shows(entries, says):
    found = faults(entries)
    assert not found if says is None else says in "\n".join(found)


def test_what_a_card_cannot_exchange_is_seen():
    control = reduced(dtypes=["bool"], control=True)
    entries = [[reduced(), reduced(dtypes=["uint8"]), reduced(does="reduce_scatter_tensor"), control]]
    for card in SERIES:
        assert forbidden(entries, card) == {("all_reduce", "uint8"), ("reduce_scatter_tensor", "float32")}
