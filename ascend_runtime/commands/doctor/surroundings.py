"""The host as the checks see it: folders of the system, variables, limits, tools. Tests play other hosts with it."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ...hardware import cores, host

PACK_FOLDER = Path(__file__).resolve().parents[3]
TOOL_SECONDS = 15  # npu-smi asks each card, which takes about a second for all; a driver that hangs takes forever
MOST_OUTPUT = 2**20  # bytes of a tool's output; npu-smi's for 16 cards has 10 KB
MOST_CARDS = 64


@dataclass(frozen=True)
class Space:
    """Bytes of a file system."""

    total: int
    free: int


def space_of(path: Path) -> Space:
    """The space for this user on the file system of a folder. Raises OSError."""
    state = os.statvfs(path)
    return Space(state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize)


def soft_limit(which: int) -> int | None:
    """This process's soft limit of a resource (setrlimit(2)); None: unlimited."""
    limit = resource.getrlimit(which)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def bind(host: str, port: int) -> str:
    """Takes a TCP address of this host, and leaves it. Returns its number, as a name may lead anywhere. Raises OSError
    if that cannot be."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not keep it
        taken.bind(address)
        return taken.getsockname()[0]


@dataclass(frozen=True)
class Surroundings:
    """kind: the devices that ranks will use, "npu", "cuda" or "cpu". models: folders of models that the user named.
    root: of the file system. python: the program that runs ComfyUI and the ranks. pack, folder: the pack's and the
    current folder. size_of, limit, bind: space of a file system, limits of a process, an address of this host. clock:
    seconds."""

    kind: str
    models: tuple[Path, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    python: str = sys.executable
    version: tuple[int, int] = sys.version_info[:2]
    pack: Path = PACK_FOLDER
    folder: Path = field(default_factory=Path.cwd)
    size_of: Callable[[Path], Space] = space_of
    limit: Callable[[int], int | None] = soft_limit
    bind: Callable[[str, int], str] = bind
    clock: Callable[[], float] = time.monotonic

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    @property
    def process(self) -> Path:
        """This process in /proc."""
        return self.proc / "self"

    @property
    def ranks(self) -> int:
        """The number of ranks that are started if the user sets none."""
        count = {"npu": host.visible_cards(self.environ) or len(host.cards()), "cuda": len(gpus(self.root))}
        return min(MOST_CARDS, max(1, count.get(self.kind, 1)))

    @property
    def cores(self) -> int:
        return cores.usable_cores(self.process)

    def tool(self, name: str) -> str | None:
        """The path of a program, by PATH."""
        return shutil.which(name, path=self.environ.get("PATH"))

    def output_of(self, *command: str) -> str:
        """What a program prints to stdout. Raises OSError if it cannot run, ends with an error, or takes too long."""
        process = subprocess.Popen(command, env=dict(self.environ), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        try:
            output, errors = process.communicate(timeout=TOOL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # and no wait for its end, as a process that a driver blocks does not end
            raise OSError(f"it did not answer within {TOOL_SECONDS} s") from None
        text = output[:MOST_OUTPUT].decode(errors="replace")
        if process.returncode:
            last = (errors[-MOST_OUTPUT:].decode(errors="replace") + text).strip().splitlines()
            raise OSError(f"it ended with status {process.returncode}: {' '.join(last[-2:])[:300]}")
        return text


def gpus(root: Path) -> list[int]:
    """The NVIDIA GPUs of this machine or container, as the numbers of their device files."""
    names = [file.name[6:] for file in (root / "dev").glob("nvidia[0-9]*")]
    return sorted(int(name) for name in names if name.isdigit())


def kind_of(device: str, environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """The devices to check. "auto": NPUs where there is any sign of them, also if they cannot be used; then GPUs."""
    if device != "auto":
        return device
    if host.cards() or host.npu_line() or find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if gpus(root) or shutil.which("nvidia-smi", path=environ.get("PATH")) else "cpu"
