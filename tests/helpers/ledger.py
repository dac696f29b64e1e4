"""A ledger of what a rank exchanges, and whether ranks with such ledgers can exchange it over HCCL or NCCL.

Gloo forgives what these do not: a member of a group that takes no part in its first exchange, from which they make the
group's communicator, and sends outside of a batch, for each pair of which torch_npu makes a communicator of its own
(Ascend/pytorch, torch_npu/csrc/distributed/ProcessGroupHCCL.cpp, pointToPoint).
"""

import sys
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from ascend_runtime.ops import card_rules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCH = "batch_isend_irecv"
# torch's operators -> the functions of torch.distributed that call them.
FUNCTIONS = {
    "_allgather_base_": "all_gather_into_tensor",
    "alltoall_base_": "all_to_all_single",
    "allreduce_": "all_reduce",
}
# Exchanges of the host's tensors, which are Gloo's on all devices.
CONTROL = {("mesh.py", name) for name in ("all_reduce_max", "all_reduce_max_of", "all_reduce_sum")}


class Ledger(TorchDispatchMode):
    """Notes, within the block, every exchange of this rank in its order, in `entries`, as json can write them."""

    def __init__(self):
        super().__init__()
        self.entries = []
        self._in_batch = False

    def __enter__(self):
        self._plain = dist.P2POp, dist.batch_isend_irecv
        dist.P2POp, dist.batch_isend_irecv = _NotedP2POp, self._batch
        return super().__enter__()

    def __exit__(self, *error):
        dist.P2POp, dist.batch_isend_irecv = self._plain
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace == "c10d" and not self._in_batch:
            leaves = tree_leaves(arguments)
            (group,) = [group for group in map(_group, leaves) if group is not None]
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            name = operator.name().partition("::")[2].partition(".")[0]
            sizes = {"bytes": [tensor.nbytes for tensor in tensors], "control": _is_control()}
            self._note(group, FUNCTIONS.get(name, name), tensors, **sizes)
        return operator(*arguments, **(keywords or {}))

    def _batch(self, exchanges):
        sends, receives = (
            [[one.peer, one.tensor.nbytes] for one in exchanges if one.op is does] for does in (dist.isend, dist.irecv)
        )
        named = all(one.named for one in exchanges)
        tensors = [one.tensor for one in exchanges]
        self._note(exchanges[0].group, BATCH, tensors, sends=sends, receives=receives, named=named, control=False)
        self._in_batch = True
        try:
            return self._plain[1](exchanges)
        finally:
            self._in_batch = False

    def _note(self, group, does, tensors, **facts):
        members = dist.get_process_group_ranks(group)
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        self.entries.append({"group": group.group_name, "members": members, "does": does, "dtypes": dtypes, **facts})


class _NotedP2POp(dist.P2POp):
    """With the note whether the call named a group."""

    def __init__(self, op, tensor, peer=None, group=None, *more, **keywords):
        super().__init__(op, tensor, peer, group, *more, **keywords)
        self.named = group is not None


def _group(argument):
    try:
        return dist.ProcessGroup.unbox(argument)
    except (TypeError, RuntimeError):
        return None


def _is_control():
    frame = sys._getframe()
    while frame is not None:
        if (Path(frame.f_code.co_filename).name, frame.f_code.co_name) in CONTROL:
            return True
        frame = frame.f_back
    return False


def faults(ledgers):
    """What HCCL or NCCL would not do with these ledgers, one of each rank of the world; empty if there is nothing.

    Plays them: an exchange takes place when all who take part have come to it, and no rank goes on before. The last
    fault is where they wait for each other.
    """
    found, queues, connected = _of_one(ledgers), [deque(entries) for entries in ledgers], set()
    while any(queues):
        together = next(filter(None, (_together(queues, rank) for rank in range(len(queues)))), None)
        if together is None:
            heads = (f"rank {rank}: {queue[0] if queue else 'done'}" for rank, queue in enumerate(queues))
            return [*found, "the ranks wait for each other; " + "; ".join(heads)]
        entry = [queues[rank].popleft() for rank in sorted(together)][0]
        if not entry["control"] and entry["group"] not in connected:
            connected.add(entry["group"])
            if missing := sorted(set(entry["members"]) - together):
                found.append(f"the first exchange of {entry['members']} is {entry['does']} without {missing}")
    return found


def forbidden(ledgers, card):
    """The collectives and dtypes in these ledgers that `card` does not have, by the rules of cards."""
    used = {(entry["does"], dtype) for entries in ledgers for entry in entries if not entry["control"]
            for dtype in entry["dtypes"]}  # fmt: skip
    return {(does, dtype) for does, dtype in used if does not in card_rules.COLLECTIVES
            or getattr(torch, dtype) not in card_rules.HCCL[card_rules.COLLECTIVES[does]][card].dtypes}  # fmt: skip


def _of_one(ledgers):
    """The faults of entries by themselves."""
    found = []
    for rank, entry in ((rank, entry) for rank, entries in enumerate(ledgers) for entry in entries):
        if entry["does"] == BATCH and not entry["named"]:
            found.append(f"rank {rank} sends or receives without naming a group")
        if entry["does"] in ("send", "recv_"):
            found.append(f"rank {rank} has a {entry['does']} outside of a batch")
    return found


def _together(queues, rank):
    """The ranks that can do the next exchange of this rank now, with it; None if they cannot yet."""
    entry = queues[rank][0] if queues[rank] else None
    if entry is None:
        return None
    if entry["does"] != BATCH:
        same = all(queues[member] and queues[member][0] == entry for member in entry["members"])
        return set(entry["members"]) if same else None
    together, reached = set(), [rank]
    while reached:
        one = reached.pop()
        together.add(one)
        peers = {peer for way in ("sends", "receives") for peer, _ in queues[one][0][way]}
        if not all(_fit(queues, one, peer) for peer in peers):
            return None
        reached += peers - together
    return together


def _fit(queues, one, other):
    """Whether what both send and receive next fits, in order and in bytes."""
    if not queues[other] or queues[other][0]["does"] != BATCH:
        return False
    here, there = queues[one][0], queues[other][0]
    return here["group"] == there["group"] and all(
        [size for peer, size in here[way] if peer == other] == [size for peer, size in there[back] if peer == one]
        for way, back in (("sends", "receives"), ("receives", "sends"))
    )
