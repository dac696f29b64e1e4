"""What ranks exchange can be exchanged over HCCL: by a ledger of each rank on Gloo (helpers/ledger.py)."""

import json
from collections import Counter

import gloo_ranks
import pytest
from ledger import BATCH, faults

JOBS = {
    2: [{"work": "sample", "cfg_degree": 2}, {"work": "sample", "cfg_degree": 1, "ulysses_degree": 2, "overlap": True},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "ring_exchange": "gather", "fsdp": True},
        {"work": "sample", "cfg_degree": 1, "tp_degree": 2}, {"work": "encode"}],
    3: [{"work": "decode", "height": 2, "width": 2}, {"work": "sample", "cfg_degree": 1, "ring_degree": 3},
        {"work": "sample", "guidance_scale": 1.0, "ulysses_degree": 3, "fsdp": True},
        {"work": "encode_video", "height": 2, "width": 2}, {"work": "decode", "height": 3, "width": 5}],
    4: [{"work": "sample", "cfg_degree": 2, "ulysses_degree": 2, "fsdp": True},
        {"work": "sample", "guidance_scale": 1.0, "cfg_degree": 2, "ulysses_degree": 2, "fsdp": True},
        {"work": "decode", "height": 4, "width": 6},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "ulysses_degree": 2},
        {"work": "sample", "cfg_degree": 1, "ring_degree": 2, "tp_degree": 2, "fsdp": True}],
    5: [{"work": "decode", "height": 8, "width": 8}, {"work": "encode_video", "height": 4, "width": 4},
        {"work": "sample", "cfg_degree": 1, "ulysses_degree": 5}],
}  # fmt: skip


# After each of these jobs: for cfg, Ulysses and FSDP; WORLD besides; no more, twice; FSDP's of two ranks.
COMMUNICATORS = {4: [3, 4, 4, 4, 5]}
# With these, torch compares what the ranks of a group exchange, too. It counts sends and receives, so it cannot where
# ranks have different numbers of neighbours.
COMPARED = (2, 4)


def ledgers(checkpoint, folder, ranks, jobs):
    """By rank and job."""
    (folder / "model").symlink_to(checkpoint)
    (folder / "cases.json").write_text(json.dumps(jobs))
    gloo_ranks.run("ledger_rank.py", folder, ranks)
    return [json.loads((folder / f"ledger-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", JOBS)
def test_ranks_exchange_what_hccl_can(checkpoint, tmp_path, monkeypatch, ranks):
    """One job after the other, on groups that earlier jobs have made."""
    if ranks in COMPARED:
        monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    kept = ledgers(checkpoint, tmp_path, ranks, JOBS[ranks])
    assert not faults([sum(jobs, []) for jobs in kept])
    for rank, jobs in enumerate(kept):
        noted, numbers = Counter(), json.loads((tmp_path / f"communicators-{rank}.json").read_text())
        for job, entries, number in zip(JOBS[ranks], jobs, numbers):
            exchanges = [entry for entry in entries if not entry["control"]]
            noted.update(entry["group"] for entry in exchanges)
            does = sorted({entry["does"] for entry in exchanges})
            print(f"{job}, rank {rank}: {len(exchanges)} exchanges, {', '.join(does)}; {number} communicators")
            assert number == len(noted) and min(noted.values(), default=2) > 1, "a group only connects, or is not counted"
        assert numbers == COMMUNICATORS.get(ranks, numbers)


def test_a_batch_of_all_ranks_in_which_one_takes_no_part_is_seen(checkpoint, tmp_path):
    """Planted: tiles on two of three ranks exchange without naming their group."""
    job = {"work": "decode", "height": 2, "width": 2, "unnamed": True}
    found = faults([jobs[0] for jobs in ledgers(checkpoint, tmp_path, 3, [job])])
    assert f"the first exchange of [0, 1, 2] is {BATCH} without [2]" in found
    assert {f"rank {rank} sends or receives without naming a group" for rank in (0, 1)} < set(found)


def reduced(size=4, group="g", members=(0, 1)):
    return {"group": group, "members": list(members), "does": "allreduce_", "bytes": size, "control": False}


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
    ([[reduced() | {"does": "send"}], [reduced() | {"does": "send"}]], "rank 0 has a send outside of a batch"),
])  # fmt: skip
def test_what_a_ledger_shows(entries, says):
    found = faults(entries)
    assert not found if says is None else says in "\n".join(found)


def test_a_collective_that_a_card_does_not_have_is_seen():
    found = faults([[reduced()], [reduced()]], allowed=lambda does: does != "allreduce_")
    assert found == [f"rank {rank}: the card has no allreduce_" for rank in (0, 1)]
