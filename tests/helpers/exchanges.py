"""A plan for each kind of exchange between ranks, for tests that strike in the middle of one."""

import random

EXCHANGES = {
    "two branches": {"ranks": 2, "cfg_degree": 2},
    "ring, rotated": {"ranks": 2, "ring_degree": 2},
    "ring, gathered": {"ranks": 2, "ring_degree": 2, "ring_exchange": "gather"},
    "heads, overlapped": {"ranks": 2, "ulysses_degree": 2, "overlap": True},
    "slices": {"ranks": 2, "tp_degree": 2},
    "shares": {"ranks": 2, "ulysses_degree": 2, "fsdp": True},
    "ring of heads": {"ranks": 4, "ring_degree": 2, "ulysses_degree": 2, "overlap": True, "fsdp": True},
    "ring of slices": {"ranks": 4, "ring_degree": 2, "tp_degree": 2, "ring_exchange": "gather", "fsdp": True},
}


def some(rng: random.Random, number: int) -> dict[str, dict]:
    """As many of them, on two ranks, which start soonest."""
    return {name: EXCHANGES[name] for name in rng.sample([n for n, p in EXCHANGES.items() if p["ranks"] == 2], number)}
