"""How a rank joins the others: through a file that the client made, or through torchrun's store."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ...errors import coded
from ...hardware import devices
from ...hardware.environment import start_deadline

POLL = 0.02  # seconds between looks into torchrun's store
STORE = "ASCEND_RUNTIME_STORE_FD"  # the variable of a group that a client started


def join_group(kind: str) -> str:
    """Joins the other ranks. Returns the group's name; empty if a client has started it.

    Raises TimeoutError if the others do not come in time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if STORE in os.environ:  # a memory file that all ranks inherit; no other process can access it
        store, name = dist.FileStore(f"/proc/self/fd/{os.environ[STORE]}", world_size), ""
    else:
        seconds = start_deadline(os.environ)
        shared = _torchrun_store(seconds)
        name = agreed_name(shared, rank, world_size, seconds)
        store = dist.PrefixStore(name, shared)
        store.set_timeout(timedelta(seconds=seconds))
    dist.init_process_group(devices.BACKENDS[kind], store=store, rank=rank, world_size=world_size)
    return name


def _torchrun_store(seconds: float) -> dist.Store:
    """torchrun's store, at MASTER_ADDR and MASTER_PORT.

    Older versions of torch give each restart a part of its own in it, by a number that each torchrun counts for itself:
    one that was started again would look elsewhere than the others. The names of groups keep restarts apart here.
    """
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
    return store


def agreed_name(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """A random name that all ranks agree on. Raises TimeoutError.

    The store may hold what earlier ranks have written. So each rank writes a random word of its own; rank 0 proposes a
    name for the words that it sees; each rank accepts a proposal with its own word in it; and the name is taken once
    all have accepted.
    """
    deadline = time.monotonic() + seconds
    word = uuid.uuid4().hex
    store.set(_key("word", rank), word)
    if rank == 0:
        return _proposed(store, world_size, deadline)
    name = ""
    while True:
        _wait_for(lambda: store.check([_key("proposal")]), "rank 0", deadline)
        proposal = json.loads(store.get(_key("proposal")))
        if proposal["words"][rank : rank + 1] == [word] and proposal["name"] != name:
            name = proposal["name"]
            store.set(_key("accepted", name, rank), "")
        if name and store.check([_key("taken", name)]):
            return name
        _wait_for(lambda: True, "rank 0", deadline)


def _proposed(store: dist.Store, world_size: int, deadline: float) -> str:
    """Rank 0's part."""
    _wait_for(lambda: store.check([_key("word", rank) for rank in range(world_size)]), "all ranks", deadline)
    words, name = None, ""
    while True:
        seen = [store.get(_key("word", rank)).decode() for rank in range(world_size)]
        if seen != words:  # at first, or as a rank has replaced an earlier one's
            words, name = seen, uuid.uuid4().hex
            store.set(_key("proposal"), json.dumps({"name": name, "words": words}))
        if store.check([_key("accepted", name, rank) for rank in range(1, world_size)] or [_key("proposal")]):
            store.set(_key("taken", name), "")
            return name
        _wait_for(lambda: True, "all ranks", deadline)


def _wait_for(condition: Callable[[], bool], whom: str, deadline: float) -> None:
    while True:
        if time.monotonic() > deadline:
            raise TimeoutError(coded("AV-1905", f"This rank has waited too long for {whom} to join the group."))
        time.sleep(POLL)
        if condition():
            return


def _key(*parts: str | int) -> str:
    return "/".join(map(str, ("ascend-video", *parts)))
