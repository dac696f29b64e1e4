"""Exchanges travel while attention computes, and those of the same ranks keep apart."""

import json

import gloo_ranks
import pytest
from sequence_rank import NAMES

# s: an exchange begins, w: one is waited for, a: attention. Query, key and value make three, as does each part of them;
# a turn of the ring is one, of four works.
CASES = {
    (1, 2, "rotate", False, 8, 4): "sss" "www" "a" "s" "w",
    (1, 2, "rotate", True, 8, 4): "sss" "www" "sss" "a" "s" "www" "a" "s" "ww",
    (2, 1, "rotate", False, 8, 4): "s" "a" "wwww" "a",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "cases.json").write_text(json.dumps([dict(zip(NAMES, case)) for case in CASES]))
    gloo_ranks.run("overlap_rank.py", folder, 2)
    return folder


def test_what_is_needed_later_is_sent_before_attention_and_waited_for_after_it(folder):
    for rank in range(2):
        assert json.loads((folder / f"order-{rank}.json").read_text()) == list(CASES.values())


def test_a_gather_and_a_ring_of_the_same_ranks_do_not_take_each_others_messages(folder):
    for rank in range(2):
        told = json.loads((folder / f"gathered-{rank}.json").read_text())
        assert told == {"gathered": [1.0] * 3 + [2.0] * 3, "arrived": [12.0 - rank] * 3}
