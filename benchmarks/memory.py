"""Memory of processes, as the kernel counts it (proc(5))."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator


# For ranks: makes glibc's malloc return freed memory immediately. By default its heap kept 60 % of the weights that a
# step had gathered, which does not happen on cards. Both values are glibc's defaults; a second value that is set
# explicitly does not grow (mallopt(3)).
GIVES_BACK = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "131072"}


def pss(pid: int) -> int:
    """Bytes; a shared page counts in proportion to the processes that share it."""
    return 1024 * int(re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1])


def rss(pid: int, field: str = "VmRSS") -> int:
    """Bytes, including shared pages; VmHWM is the peak since the last `highest_rss`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


@contextmanager
def highest_rss(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """The peak bytes of each process within the block, available after it."""
    pids, highest = list(pids), {}
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak RSS
    yield highest
    highest |= {pid: rss(pid, "VmHWM") for pid in pids}
