"""Makes a cluster's file and key, and prints what to do with them on each machine."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

from ...checkpoints.faults import printable, printable_lines
from ...errors import coded_error
from ...specs.cluster import KEY_SUFFIX, Cluster, cluster_names, file_of_cluster, folder_of_clusters, read_cluster
from ...wire import tls
from ..progress import ProgressDisplay
from .options import described

RENDEZVOUS_PORT = 29500  # as in torchrun's examples
_REMOTE = ".config/ascend-video/clusters"  # in the home of a machine's user
_WORKER = "ascend_runtime.engine.worker"
# torch's default shares a store of torchrun's between starts of the ranks. A torchrun that was started again then waits
# a minute or more for the address of the store, which the others do not publish again (torch 2.13,
# DynamicRendezvousHandler.next_rendezvous).
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
# What stands for the address of the first machine, if a cluster's is every interface, and for that of another one.
_FIRST, _OTHER = "HOST", "ADDRESS"


def run(arguments: Namespace, progress: ProgressDisplay) -> int:
    progress.end()
    if arguments.action == "list":
        return _list(progress)
    cluster = made(described(arguments)) if arguments.action == "new" else read_cluster(arguments.name)
    if cluster.risk is not None:
        progress.say(
            f"warning: {cluster.risk}, so strangers may reach it. They cannot join without the key, but torch's own "
            "ports between the machines have no key: give an address in a private network."
        )
    print(printable_lines(_text(cluster, arguments.machines)))
    return 0


def made(cluster: Cluster) -> Cluster:
    """Makes the folder, the key and the file of a cluster. Raises ValueError if one of the files exists."""
    file, key = file_of_cluster(cluster.name), Path(cluster.key)
    content = {"listen": cluster.listen, "key": key.name, "ranks": cluster.ranks}
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    tls.make_key(key, cluster.name)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(json.dumps(content, indent=2) + "\n")
    except FileExistsError:
        key.unlink()
        raise coded_error("AV-1901", f"{file} exists. Give another name, or delete it.") from None
    except BaseException:
        key.unlink()
        raise
    return cluster


def _list(progress: ProgressDisplay) -> int:
    names = cluster_names()
    if not names:
        progress.say(f"there is no cluster in {folder_of_clusters()}; `python -m ascend_runtime cluster new` makes one")
    for name in names:
        try:
            found = read_cluster(name)
            print(f"{name}: {found.ranks} ranks, {found.listen}")
        except ValueError as error:
            print(printable(f"{name}: {error}"))
    return 0


def _text(cluster: Cluster, machines: int) -> str:
    """What is to be done with a cluster. The key is named, and not shown."""
    remote = f"{_REMOTE}/{cluster.name}{KEY_SUFFIX}"
    each = "on each machine" if machines == 1 else f"on each of the {machines} machines"
    lines = [
        f"cluster {cluster.name}: {cluster.ranks} ranks on {machines} machine(s)",
        f"file     {file_of_cluster(cluster.name)}",
        f"address  {cluster.listen}",
        f"key      {cluster.key}",
        "",
        "Copy the key to each other machine, and keep it from anyone else: who has it can join and read all.",
        "",
        f'    ssh MACHINE "mkdir -p -m 700 ~/{_REMOTE}"',
        f"    scp -p {cluster.key} MACHINE:{remote}",
        "",
        f"Then start the ranks {each}, in the pack's folder, with the Python that has torch.",
    ]  # fmt: skip
    return "\n".join([*lines, *_starts(cluster, machines), "", f"In ComfyUI's page, press R, and choose {cluster.name} "
                      "in Ascend Parallel Config (advanced: cluster)."])  # fmt: skip


def _starts(cluster: Cluster, machines: int) -> list[str]:
    """The commands for the machine that the others meet at, this one, and for the others."""
    host = _FIRST if cluster.everywhere else cluster.listen.rpartition(":")[0]
    first = ["", "This machine, at which they meet (if it has no ranks: another one, whose address is then in "
             "--rdzv-endpoint):", "", *_torchrun(cluster, host, machines, first=True)]  # fmt: skip
    others = ["", f"Each other machine, with its own address for {_OTHER}:", "",
              *_torchrun(cluster, host, machines, first=False)]  # fmt: skip
    return first + (others if machines > 1 else [])


def _torchrun(cluster: Cluster, host: str, machines: int, *, first: bool) -> list[str]:
    """host: the first machine's address. Each machine names its own, as torch would give the others its host's name."""
    port = cluster.address[1]
    meeting = RENDEZVOUS_PORT + (port == RENDEZVOUS_PORT)
    own, key = (host.strip("[]"), cluster.key) if first else (_OTHER, f"~/{_REMOTE}/{cluster.name}{KEY_SUFFIX}")
    return [
        f"    {_OWN_STORE} torchrun --nnodes {machines} --nproc-per-node {cluster.ranks // machines} \\",
        "        --max-restarts 100 \\",
        f"        --rdzv-backend c10d --rdzv-id {cluster.name} --rdzv-endpoint {host}:{meeting} \\",
        f"        --rdzv-conf is_host={int(first)} --local-addr {own} \\",
        f"        -m {_WORKER} --client {host}:{port} --key {key}",
    ]
