"""Memory of processes, as the kernel counts it (proc(5))."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator


# For ranks: glibc's malloc gives back at once what is freed. Left to itself it kept 60 % of the weights that had passed
# through a step in holes of its heap, which says nothing of cards, where no malloc holds them. Both values are glibc's
# own defaults; the second, being set here, does not grow (mallopt(3)).
GIVES_BACK = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "131072"}


def pss(pid: int) -> int:
    """Bytes, of shared pages its part."""
    return 1024 * int(re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])


def rss(pid: int, field: str = "VmRSS") -> int:
    """Bytes, shared pages in whole; VmHWM is the highest since the last `highest_rss`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


@contextmanager
def highest_rss(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """Bytes of each process at most within the block; known after it."""
    pids, highest = list(pids), {}
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the highest RSS is counted from now on
    yield highest
    highest |= {pid: rss(pid, "VmHWM") for pid in pids}
