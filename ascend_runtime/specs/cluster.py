"""A cluster: machines whose ranks were started by torchrun, and where they find the client. Read from a small file."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec.structs import force_setattr

from ..errors import coded_error
from .base import MAX_PATH, Spec, require_range
from .parallel import MAX_RANKS

FOLDER_VARIABLE = "ASCEND_RUNTIME_CLUSTERS"  # with the folder of clusters' files
SUFFIX, KEY_SUFFIX = ".json", ".key"
MAX_FILE = 2**16  # bytes
FILE_FIELDS = ("listen", "key", "ranks", "paths")  # of a file
REQUIRED_FIELDS = FILE_FIELDS[:3]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ZEROS = re.compile(r"0[0xX.]*")  # of which systems make 0.0.0.0
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


class Cluster(Spec, frozen=True, kw_only=True):
    """Machines that work as one group of ranks.

    name: of the file. listen: HOST:PORT, where the client waits for the machines: an address of this host, in the
    network that the machines are in. key: the absolute path of the key file, which all machines have. ranks: the number
    on all machines together. paths: for each machine by name, folders as specs have them -> the same folders there; all
    absolute.

    Its text is the name only, as logs and errors quote it.
    """

    name: str
    listen: str
    key: str
    ranks: int
    paths: dict[str, dict[str, str]] = {}

    def __post_init__(self):
        super().__post_init__()
        require_name(self.name, "The name")
        address_of(self.listen)
        require_range("ranks", self.ranks, 1, MAX_RANKS)
        force_setattr(self, "key", _absolute(self.key, "key"))
        force_setattr(self, "paths", {machine: _mapping(machine, folders) for machine, folders in self.paths.items()})

    def __repr__(self) -> str:
        return f"Cluster({self.name!r})"

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) to listen at."""
        return address_of(self.listen)

    def require_all(self, ranks: int) -> None:
        """Raises ValueError if a user asks for a number of ranks, 0 for automatic, that is not the cluster's."""
        if ranks not in (0, self.ranks):
            raise coded_error(
                "AV-1904",
                f"ranks is {ranks}, but the cluster {self.name!r} has {self.ranks}, which work on one video together. "
                "Set ranks to 0 (auto).",
            )

    @property
    def everywhere(self) -> bool:
        """Whether the address is every interface of the host."""
        given = _parsed(self.address[0])
        return given is not None and given.is_unspecified or _ZEROS.fullmatch(self.address[0]) is not None

    @property
    def risk(self) -> str | None:
        """Why strangers may reach the address; None for one in a private network, and for a name."""
        host, given = self.address[0], _parsed(self.address[0])
        if self.everywhere:
            return f"{host} is every interface of this host"
        return f"{host} is an address of the public internet" if given is not None and given.is_global else None


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def require_name(text: str, what: str) -> None:
    """Raises ValueError if this can be the name of neither a cluster nor a machine."""
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{what} is {text[:80]!r}; give 1 to 64 letters, digits, dots, dashes and underscores, of which the first "
            "is a letter or a digit."
        )


def address_of(text: str, what: str = "listen") -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 address is in brackets. Raises ValueError, with the name `what`."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(
            f"{what} is {text[:300]!r}; give HOST:PORT, such as 192.168.10.1:29600 or [fd00::1]:29600, with a port "
            "from 1 to 65535."
        )
    return found[1].strip("[]"), int(found[2])


def folder_of_clusters(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of clusters' files."""
    given = environ.get(FOLDER_VARIABLE)
    home = Path(environ.get("HOME") or Path.home())
    return Path(given).expanduser().absolute() if given else home / ".config" / "ascend-video" / "clusters"


def file_of_cluster(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The path of a cluster's file. Raises ValueError for a name that cannot be one."""
    try:
        require_name(name, "The name of the cluster")
    except ValueError as error:
        raise coded_error("AV-1901", str(error)) from None
    return folder_of_clusters(environ) / f"{name}{SUFFIX}"


def cluster_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the clusters that have a file on this host."""
    try:
        files = list(folder_of_clusters(environ).glob(f"*{SUFFIX}"))
    except OSError:
        return []
    return sorted(file.stem for file in files if _NAME.fullmatch(file.stem))


def read_cluster(name: str, environ: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster of this name. Raises ValueError if there is none, or if its file cannot be used."""
    file = file_of_cluster(name, environ)
    try:
        return _from_file(file, name)
    except FileNotFoundError:
        known = ", ".join(cluster_names(environ)) or "none"
        raise coded_error(
            "AV-1901",
            f"There is no cluster {name!r} on this host; the clusters of {file.parent} are: {known}. Choose one of "
            "these or \"this machine\", or make it: python -m ascend_runtime cluster new.",
        ) from None
    except OSError as error:
        raise coded_error("AV-1901", f"{file} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise coded_error("AV-1901", f"{file}: {error}") from None


def _from_file(file: Path, name: str) -> Cluster:
    if file.exists() and not file.is_file():
        raise ValueError("this is not a file.")
    with open(file, "rb") as opened:
        content = opened.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"it has more than {MAX_FILE} bytes; a cluster's file has a few lines.")
    try:
        given = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise ValueError(f"it is not a JSON object with the fields {', '.join(FILE_FIELDS)}.")
    if unknown := [field for field in given if field not in FILE_FIELDS]:
        raise ValueError(f"there is no field {unknown[0][:80]!r}; the fields are {', '.join(FILE_FIELDS)}.")
    if missing := [field for field in REQUIRED_FIELDS if field not in given]:
        raise ValueError(f"the field {missing[0]!r} is missing; a cluster has {', '.join(REQUIRED_FIELDS)}.")
    if isinstance(given["key"], str):
        given["key"] = str(file.parent / Path(given["key"]).expanduser())
    return Cluster(name=name, **given)


def _mapping(machine: str, folders: dict[str, str]) -> dict[str, str]:
    """Of paths: without double and closing slashes."""
    require_name(machine, "The name of a machine in paths")
    what = f"A folder of paths of {machine}"
    for folder in (*folders, *folders.values()):
        if ".." in folder.split("/"):  # which leads elsewhere through a link
            raise ValueError(f"{what} is {folder[:300]!r}; give it without '..', such as /data/models.")
    made = {_absolute(here, what): _absolute(there, what) for here, there in folders.items()}
    if len(made) < len(folders):
        raise ValueError(f"The paths of {machine} have a folder twice: {', '.join(map(repr, folders))}.")
    return made


def _absolute(path: str, what: str) -> str:
    is_text = not any("\ud800" <= character <= "\udfff" for character in path)
    if not path.startswith("/") or len(path) > MAX_PATH or "\0" in path or not is_text:
        raise ValueError(f"{what} is {path[:300]!r}; give an absolute path, such as /data/models.")
    return os.path.normpath(path)
