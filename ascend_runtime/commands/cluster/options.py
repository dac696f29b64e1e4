"""The arguments of the command, and their checks. Does not import torch."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ...specs.base import require_range
from ...specs.cluster import KEY_SUFFIX, Cluster, file_of_cluster, folder_of_clusters, read_cluster
from ...specs.parallel import MAX_RANKS


def declare_cluster(parser: ArgumentParser) -> None:
    parser.description = (
        "Makes and shows clusters: machines whose ranks make one video together (docs/machines.md).\n\n"
        "A cluster is a small JSON file and a key, in ~/.config/ascend-video/clusters or in the folder that\n"
        "ASCEND_RUNTIME_CLUSTERS names. The key is never printed."
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    new = actions.add_parser("new", help="make a cluster and its key", description="Makes a cluster's file and its "
                             "key, and prints how to copy the key and start the ranks.")  # fmt: skip
    new.add_argument("name", metavar="NAME", help="under which Ascend Parallel Config lists it")
    new.add_argument("--listen", required=True, metavar="HOST:PORT", help="where ComfyUI waits for the machines: an "
                     "address of this host in their private network, such as 192.168.10.1:29600")  # fmt: skip
    new.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks on all machines together")
    actions.add_parser("list", help="list the clusters of this host", description="Lists the clusters of this host.")
    show = actions.add_parser("show", help="show a cluster, and how its ranks are started", description="Shows a "
                              "cluster, how its key is copied, and how its ranks are started.")  # fmt: skip
    show.add_argument("name", metavar="NAME", help="the cluster's name")
    for one in (new, show):
        one.add_argument("--machines", type=int, default=2, metavar="N",
                         help="number of machines, for the commands that are printed (default: %(default)s)"
                         )  # fmt: skip


def check_cluster(arguments: Namespace) -> None:
    """Raises ValueError for invalid arguments, and for a cluster that would be overwritten or does not exist."""
    if arguments.action == "list":
        return
    require_range("--machines", arguments.machines, 1, MAX_RANKS)
    cluster = described(arguments) if arguments.action == "new" else read_cluster(arguments.name)
    if cluster.ranks % arguments.machines:
        raise ValueError(
            f"--machines is {arguments.machines}, and {cluster.ranks} ranks cannot be divided among them equally. Give "
            "numbers that can."
        )
    if arguments.action == "new":
        for file in (file_of_cluster(cluster.name), file_of_cluster(cluster.name).with_suffix(KEY_SUFFIX)):
            if file.exists() or file.is_symlink():
                raise ValueError(f"{file} exists. Give another name, or delete it.")


def described(arguments: Namespace) -> Cluster:
    """The cluster that `new` makes."""
    file = file_of_cluster(arguments.name)
    key = f"{file.with_suffix(KEY_SUFFIX)}"
    return Cluster(name=arguments.name, listen=arguments.listen, key=key, ranks=arguments.ranks)


def begins_cluster(arguments: Namespace) -> str:
    if arguments.action == "list":
        return f"listing the clusters in {folder_of_clusters()}"
    return f"{'making' if arguments.action == 'new' else 'showing'} the cluster {arguments.name}"
