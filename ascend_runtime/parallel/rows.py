"""How FSDP2 deals the rows of a parameter. Free of torch."""

from __future__ import annotations


def own_rows(rows: int, shards: int, shard: int) -> range:
    """The rows in shard number `shard` of `shards`: chunks of equal size, the last ones shorter or empty."""
    size = -(-rows // shards)
    start = min(shard * size, rows)
    return range(start, min(start + size, rows))
