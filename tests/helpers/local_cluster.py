"""A cluster of one machine, this one, whose ranks torchrun starts: for tests of what a client shows of it."""

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path

from ascend_runtime.wire.tls import make_key
from rank_processes import processes_with, seconds_until
from scripts.lib.comfy_server import free_port

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "atlas1"
_libc = ctypes.CDLL(None)


class LocalCluster:
    """folder: of clusters' files; gets the file, the key, and the output of torchrun."""

    def __init__(self, folder: Path, name: str, ranks: int = 2):
        folder.mkdir(mode=0o700, exist_ok=True)
        self.name, self.ranks, self.folder = name, ranks, folder
        self.address, self.rendezvous = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.key = folder / f"{name}.key"
        make_key(self.key, name)
        self.write()
        self._torchrun = None

    def write(self, **changes) -> None:
        """Writes the cluster's file."""
        content = {"listen": self.address, "key": self.key.name, "ranks": self.ranks} | changes
        (self.folder / f"{self.name}.json").write_text(json.dumps(content))

    def remove(self) -> None:
        """Its files."""
        for file in (self.folder / f"{self.name}.json", self.key):
            file.unlink()

    def start(self, environment: dict[str, str]) -> None:
        """Starts torchrun, as `cluster new` prints it."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(self.ranks),
            "--max-restarts", "100", "--rdzv-backend", "c10d", "--rdzv-id", self.name, "--rdzv-endpoint",
            self.rendezvous, "--rdzv-conf", "is_host=1", "--local-addr", "127.0.0.1",
            "-m", "ascend_runtime.engine.worker", "--client", self.address, "--key", str(self.key),
            "--machine", MACHINE, "--device", "cpu",
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self._torchrun = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                              stderr=log, preexec_fn=_die_with_parent)  # fmt: skip

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank of the ranks proper."""
        found = processes_with("ASCEND_RUNTIME_PARENT", str(self._torchrun.pid))
        return {rank: pid for rank, pid in found.items() if rank is not None}

    @property
    def secrets(self) -> list[str]:
        """What is to be found in no graph, file or log: the lines of the key's content."""
        return [line for line in self.key.read_text().splitlines() if line and not line.startswith("-----")]

    def stop(self) -> None:
        """The ranks end with torchrun."""
        if self._torchrun is not None:
            self._torchrun.kill()
            self._torchrun.wait()
            seconds_until(lambda: not self.pids, timeout=20)


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
