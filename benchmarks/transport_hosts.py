"""The cost of requests to ranks on other hosts, which are network namespaces: `transport --hosts`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from .report import Row, context_of
from .transport import FRAMES, REPLY, SENT, touch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))  # which makes the same hosts for tests
import cluster_ranks
import hosts

RATE = 1e9  # bits per second of the client's link
LIMIT = "1gbit"
MOST_OVER_PING = 1.5  # ms
LEAST_SHARE = 0.8  # of the rate


def run(quick: bool) -> Iterator[Row]:
    if (lacking := hosts.lacking()) is not None:
        raise SystemExit(f"Hosts cannot be made: {lacking}")
    with hosts.Hosts(3) as three, TemporaryDirectory() as folder:
        client, *machines = three
        with cluster_ranks.ClusterRanks(machines, 1, folder, client=client) as ranks, client.entered():
            runtime = ranks.runtime()
            runtime.start()
            try:
                yield _null(runtime, client, machines[1], quick)
                client.limit(LIMIT)
                yield from _shares(runtime, quick)
            finally:
                runtime.stop()


def _null(runtime, client, machine, quick: bool) -> Row:
    """Requests and pings take turns."""
    requests, pings = [], []
    for number in range(3 if quick else 41):
        times = [_seconds(runtime.ping) for _ in range(50)]
        if number:  # the first round does not count
            requests += times
            pings += _ping(client, machine.address, 50)
    request, ping = (1e3 * median(times) for times in (requests, pings))
    p10, p90 = (round(1e3 * sorted(requests)[int(share * (len(requests) - 1))], 4) for share in (0.1, 0.9))
    figures = {"request_ms": round(request, 4), "icmp_ping_ms": round(ping, 4), "p10": p10, "p90": p90}
    context = _context(quick, len(requests), **figures)
    return Row(name="transport.hosts.null_over_ping_ms", value=request - ping, unit="ms", better="lower",
               baseline=MOST_OVER_PING, context=context)  # fmt: skip


def _shares(runtime, quick: bool) -> Iterator[Row]:
    """Bytes of tensors per second, of both machines together, as a share of what the client's link carries."""
    frames = (5, 48, 64, 3) if quick else FRAMES
    sent, reply = torch.rand(1000 if quick else SENT), 500 if quick else REPLY
    size = 4 * torch.Size(frames).numel()
    measured = (  # name, bytes, call
        ("frames", size, lambda: runtime.ping(frames=frames)),
        ("request", 2 * 4 * len(sent) + 4 * reply, lambda: runtime.ping(sent, reply)),
    )
    for name, count, call in measured:
        times = [_seconds(call, touched=True) for _ in range(2 if quick else 11)][1:]
        seconds = median(times)
        context = _context(quick, len(times), mb=round(count / 1e6, 1), seconds=round(seconds, 4), rate=LIMIT)
        yield Row(name=f"transport.hosts.{name}_share", value=8 * count / seconds / RATE, unit="of rate",
                  better="higher", baseline=LEAST_SHARE, context=context)  # fmt: skip


def _seconds(call, touched: bool = False) -> float:
    began = time.perf_counter()
    answer = call()
    if touched:
        touch(answer.tensor)
    return time.perf_counter() - began


def _ping(host, address: str, count: int) -> list[float]:
    """Seconds of as many echoes of the kernel (ICMP)."""
    process = host.start(["ping", "-c", count, "-i", "0.002", address], stdout=subprocess.PIPE, text=True)
    said = process.communicate(timeout=60)[0]
    return [float(found) / 1e3 for found in re.findall(r"time=([0-9.]+) ms", said)]


def _context(quick: bool, runs: int, **more):
    return context_of(quick, hosts=2, ranks=2, runs=runs, link="veth of network namespaces", **more)
