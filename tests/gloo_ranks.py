"""Ranks that a test starts by itself, joined by Gloo: for what the runtime's own ranks do not show."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def join():
    """In such a process, of one thread: (the folder, its number, how many there are). They meet in a file of the
    folder, at no port."""
    folder = Path(sys.argv[1]).resolve()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    return folder, rank, ranks


def run(script, folder, ranks, timeout=120):
    """Runs tests/`script` FOLDER in `ranks` processes, which find RANK and WORLD_SIZE; all must succeed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": str(ranks),
                   "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(ranks)]
    try:
        assert [process.wait(timeout) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()
