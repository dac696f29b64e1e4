"""A cluster: machines whose ranks were started by torchrun, and where they find the client. Read from a small file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from ..errors import coded_error
from .base import Spec, require_range
from .parallel import MAX_RANKS
from .paths import check_folders

FOLDER = "ASCEND_RUNTIME_CLUSTERS"  # the variable with the folder of clusters' files
SUFFIX = ".json"
MAX_FILE = 2**16  # bytes
ANY_INTERFACE = ("0.0.0.0", "::")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%a-z]+\]|[^\s:\[\]]+):([0-9]{1,5})")


class Cluster(Spec, frozen=True, kw_only=True):
    """Machines that work as one group of ranks.

    name: of the file. listen: HOST:PORT, where the client waits for the machines: an address of this host, in the
    network that the machines are in. key: the path of the key file, which all machines have; relative to the cluster's
    file. ranks: the number on all machines together. paths: for each machine by name, folders as specs have them ->
    the same folders there.
    """

    name: str
    listen: str
    key: str
    ranks: int
    paths: dict[str, dict[str, str]] = {}

    def __post_init__(self):
        super().__post_init__()
        address_of(self.listen)
        require_range("ranks", self.ranks, 1, MAX_RANKS)
        for machine, folders in self.paths.items():
            try:
                check_folders(folders)
            except ValueError as error:
                raise ValueError(f"paths of {machine}: {error}") from None

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) to listen at."""
        return address_of(self.listen)


def address_of(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 address is in brackets. Raises ValueError."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"The address is {text!r}; give HOST:PORT, such as 192.168.10.1:29600 or [fd00::1]:29600.")
    return found[1].strip("[]"), int(found[2])


def folder() -> Path:
    """The folder of clusters' files."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path.home() / ".config" / "ascend-video" / "clusters"


def cluster_names() -> list[str]:
    """The names of the clusters that have a file."""
    try:
        found = [file.stem for file in folder().glob(f"*{SUFFIX}") if _NAME.fullmatch(file.stem)]
    except OSError:
        return []
    return sorted(found)


def read(name: str) -> Cluster:
    """The cluster of this name, with the absolute path of its key. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise coded_error("AV-1901", f"{name!r} is not the name of a cluster: letters, digits, dots and dashes.")
    file = folder() / f"{name}{SUFFIX}"
    try:
        with open(file, "rb") as opened:
            given = msgspec.json.decode(opened.read(MAX_FILE), type=dict)
        found = Cluster(**(given | {"name": name}))
    except FileNotFoundError:
        known = ", ".join(cluster_names()) or "none"
        raise coded_error("AV-1901", f"There is no cluster {name!r} in {folder()}; there are: {known}.") from None
    except (OSError, msgspec.MsgspecError, TypeError, ValueError) as error:
        raise coded_error("AV-1901", f"The file of a cluster, {file}, cannot be used: {error}") from None
    return msgspec.structs.replace(found, key=str(file.parent / Path(found.key).expanduser()))
