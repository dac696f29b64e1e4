"""A rank that measures the link between hosts, for a test: `link_rank.py STORE FILE`.

RANK and WORLD_SIZE say which of how many. STORE: HOST:PORT of the first host. The rank writes the link's costs, and
the seconds of measuring, to FILE.
"""

import json
import os
import socket
import sys
import time
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ascend_runtime.parallel.machines import know_machines
from ascend_runtime.parallel.measured_link import measured_link


def main():
    torch.set_num_threads(1)
    (host, port), rank, ranks = sys.argv[1].split(":"), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(host, int(port), ranks, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    know_machines(socket.gethostname())
    start = time.monotonic()
    link = measured_link("cpu")
    Path(sys.argv[2]).write_text(json.dumps([*astuple(link)[:3], time.monotonic() - start]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
