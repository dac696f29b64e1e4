"""A rank that notes in which order it exchanges and attends, for a test: `overlap_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds cases.json as sequence_rank.py reads it; the rank writes, by
number, what happened in each attention to order-RANK.json: "send", "arrived" and "attend", each a letter. It also
gathers by DirectGather around an exchange of a ring of the same ranks, whose receives are posted in another order on
rank 1, and writes what came to gathered-RANK.json.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.ops import PlainOperators
from ascend_runtime.parallel.direct_gather import DirectGather
from ascend_runtime.parallel.fsdp import sharding_of
from ascend_runtime.parallel.mesh import mesh_of
from ascend_runtime.specs import Plan
from sequence_rank import attend

LETTERS = {"send": "s", "arrived": "w", "attend": "a"}


class Noted:
    """A work that says when it was waited for."""

    def __init__(self, work, events):
        self._work, self._events = work, events

    def wait(self):
        self._events.append("arrived")
        return self._work.wait()


def note(events):
    """Has every exchange of attentions, and every attention, tell `events`."""
    to_all, batch = dist.all_to_all_single, dist.batch_isend_irecv

    def all_to_all_single(*arguments, **keywords):
        events.append("send")
        return Noted(to_all(*arguments, **keywords), events)

    def batch_isend_irecv(exchanges):
        events.append("send")
        return [Noted(work, events) for work in batch(exchanges)]

    dist.all_to_all_single, dist.batch_isend_irecv = all_to_all_single, batch_isend_irecv
    for name in ("_attend", "_attend_with_lse"):
        plain = getattr(PlainOperators, name)
        setattr(PlainOperators, name, lambda *qkv, plain=plain: (events.append("attend"), plain(*qkv))[1])


def gathered_around_an_exchange(rank):
    """What came of a gather of FSDP, and of an exchange of a ring over the same ranks."""
    gathering, passing = sharding_of("cpu", 2, 1, True).mesh.get_group(), mesh_of("cpu", Plan(ring=2)).group("ring")
    own, output = torch.full((3,), 1.0 + rank), torch.zeros(6)
    share = output.chunk(2)[rank].copy_(own)
    passed, arrived = torch.full((3,), 11.0 + rank), torch.zeros(3)

    def gather():
        return [DirectGather()(output, share, gathering, async_op=True)]

    def exchange():
        exchanges = (dist.isend, passed), (dist.irecv, arrived)
        return dist.batch_isend_irecv([dist.P2POp(does, x, 1 - rank, passing) for does, x in exchanges])

    first, second = (gather, exchange) if rank == 0 else (exchange, gather)
    for work in [*first(), *second()]:
        work.wait()
    return {"gathered": output.tolist(), "arrived": arrived.tolist()}


def main():
    folder, rank, ranks = gloo_ranks.join()
    (folder / f"gathered-{rank}.json").write_text(json.dumps(gathered_around_an_exchange(rank)))
    events, orders = [], []
    note(events)
    for case in json.loads((folder / "cases.json").read_text()):
        events.clear()
        x = torch.randn(1, case["tokens"], case["heads"], 8)
        attend({"query": x, "key": x, "value": x}, **case)
        orders.append("".join(LETTERS[event] for event in events))
    (folder / f"order-{rank}.json").write_text(json.dumps(orders))
    dist.destroy_process_group()
