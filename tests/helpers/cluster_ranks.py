"""Ranks that torchrun starts on hosts (see hosts.py), for a client of the test."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ascend_runtime import ParallelSpec, Runtime
from ascend_runtime.specs.cluster import Cluster
from ascend_runtime.wire.tls import make_key
from hosts import end
from rank_processes import environment_of

ROOT = Path(__file__).resolve().parents[2]
PORT, RENDEZVOUS = 29600, 29500
WORKER = "ascend_runtime.engine.worker"
RELAY = "ascend_runtime.engine.machine.relay"
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "MKL_CBWR": "AUTO,STRICT",
    # As docs/machines.md says: else a torchrun that is started again waits for a minute in vain for the first one's.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}  # fmt: skip


class ClusterRanks:
    """A number of ranks on each host, and the cluster that they belong to: a context manager.

    client: the client's host; by default the first, where torchrun's rendezvous is too. folder: gets the key, and the
    output of each torchrun, `host1.log` and so on. options: of the worker, after --client, --key, --device.
    """

    def __init__(self, hosts, ranks_of_each, folder, *, options=(), environment=None, client=None):
        self.hosts, self.ranks_of_each, self.folder = hosts, ranks_of_each, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = self.folder / "two_hosts.key"
        make_key(self.key, "two_hosts")
        self.host_of_client = client or hosts[0]
        listen = f"{self.host_of_client.address}:{PORT}"
        self.cluster = Cluster(name="two_hosts", listen=listen, key=str(self.key), ranks=ranks_of_each * len(hosts))
        self.clients = dict.fromkeys(hosts, listen)  # where each host finds the client
        self.processes = {}  # of torchrun, by host
        self._options = list(options)
        temporary = self.folder / "tmp"  # torchrun leaves a folder there when it is killed
        temporary.mkdir()
        self._environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(temporary), **(environment or {})}

    def __enter__(self):
        for host in self.hosts:
            self.start(host)
        return self

    def __exit__(self, *_):
        self.stop()

    # torchrun

    def command(self, host):
        """torchrun's on a host, as docs/machines.md has it."""
        return [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={len(self.hosts)}", f"--nproc-per-node={self.ranks_of_each}", "--max-restarts=100",
            "--rdzv-backend=c10d", "--rdzv-id=two_hosts", f"--rdzv-endpoint={self.hosts[0].address}:{RENDEZVOUS}",
            f"--rdzv-conf=is_host={int(host is self.hosts[0])}", f"--local-addr={host.address}",
            "-m", WORKER, "--client", self.clients[host], "--key", str(self.key), "--device", "cpu", *self._options,
        ]  # fmt: skip

    def start(self, host):
        """Starts torchrun on a host."""
        with open(self.log(host), "ab") as log:
            self.processes[host] = host.start(
                self.command(host), cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def revive(self):
        """Starts torchrun again where it has ended, as a supervisor does."""
        for host, process in self.processes.items():
            if process.poll() is not None:
                self.start(host)

    def stop(self):
        """Kills torchrun on each host, and whatever it may have left."""
        for process in self.processes.values():
            process.kill()
        end(self.hosts)
        for process in self.processes.values():
            process.wait()

    def log(self, host):
        return self.folder / f"{host.name}.log"

    @property
    def output(self):
        """What all torchruns have printed."""
        return "\n".join(self.log(host).read_text(errors="replace") for host in self.hosts if self.log(host).exists())

    # Processes

    def ranks(self, host):
        """Process ids by rank of the ranks proper on a host."""
        found = {}
        for pid in host.pids:
            environment = environment_of(pid)
            if "ASCEND_RUNTIME_CONTROL_FD" in environment and module_of(pid) == WORKER:
                found[int(environment["RANK"])] = pid
        return found

    def relays(self, host):
        return [pid for pid in host.pids if module_of(pid) == RELAY]

    def ours(self, host):
        """The processes of ours on a host: ranks, also those that are joining, and the relay."""
        return [pid for pid in host.pids if module_of(pid) in (WORKER, RELAY)]

    def runtime(self, **parallel):
        """A client of these ranks; to be used by a thread that is on the client's host."""
        return Runtime(ParallelSpec(**parallel), device="cpu", cluster=self.cluster)

    def client(self, **parallel):
        """The same, for any thread."""
        return ClientOn(self.host_of_client, self.runtime(**parallel))


class SlurmRanks(ClusterRanks):
    """The same, started by scripts/ranks.slurm, with `srun` replaced by a local loop over the hosts."""

    def __enter__(self):
        programs = self.folder / "programs"
        programs.mkdir()
        commands = [f"SLURM_NODEID={number} SLURMD_NODENAME={host.name} {shlex.join(host.prefix)}"
                    for number, host in enumerate(self.hosts)]  # fmt: skip
        skip = 'while [ "${1#--}" != "$1" ]; do shift; done'  # its own options
        loop = "\n".join([skip, *(f'{command} "$@" &' for command in commands), "wait"])
        self._write(programs / "srun", f"# A local loop in place of SLURM's.\n{loop}\n")
        self._write(programs / "scontrol", "\n".join(f"echo {host.name}" for host in self.hosts))
        self._write(programs / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"\n')
        environment = {
            **self._environment, "PATH": f"{programs}:{os.environ['PATH']}", "RANKS": str(self.ranks_of_each),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NNODES": str(len(self.hosts)),
        }  # fmt: skip
        command = ["setpriv", "--pdeathsig", "KILL", "bash", "scripts/ranks.slurm", "--client", self.cluster.listen,
                   "--key", str(self.key), "--device", "cpu", *self._options]  # fmt: skip
        with open(self.log(self.hosts[0]), "ab") as log:
            self._job = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                         stderr=log)  # fmt: skip
        return self

    @staticmethod
    def _write(file, text):
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)

    def stop(self):
        self._job.kill()
        self._job.wait()
        super().stop()


class ClientOn:
    """A Runtime on a host: its methods run there."""

    def __init__(self, host, runtime):
        self._host, self._runtime = host, runtime

    def __getattr__(self, name):
        found = getattr(self._runtime, name)
        if not callable(found):
            return found

        def called(*given, **named):
            with self._host.entered():
                return found(*given, **named)

        return called


def module_of(pid):
    """The module that a Python process runs (-m), or None."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if "torch.distributed.run" in words:
        return "torch.distributed.run"
    return words[words.index("-m") + 1] if "-m" in words[:-1] else None


def seconds_until_none(pids_of, timeout):
    """How long it took until `pids_of()` was empty."""
    began = time.monotonic()
    while pids := pids_of():
        assert time.monotonic() - began < timeout, f"processes {pids} are still there after {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - began
