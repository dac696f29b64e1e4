"""The first step of a rank that torchrun started: finds its machine's relay, and becomes the rank proper.

The process replaces its program (execve) once the environment is as a rank needs it: memory allocators and OpenMP read
their variables when a process starts. Does not import torch, which would be loaded twice.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ...errors import coded_error
from ...hardware import host
from ...hardware.cores import THREADS_VARIABLE
from ...hardware.environment import rank_environment
from ...hardware.interfaces import interfaces_towards
from ...hardware.processes import die_with, parent_of
from ...hardware.ranks import variables_of_ranks
from ...specs.cluster import address_of, require_name
from ...wire.packets import ChannelClosed, Packets, header
from .relay.settings import Arrival, RelaySettings, name_of_socket, pause_before_failing, peer_of

DEFAULT_WAIT = 3600  # seconds
NAME_DEADLINE = 15.0  # seconds until the relay of ranks that were ended has gone
RELAY_DEADLINE = 60.0  # seconds for the machine's first rank to start the relay, and for the relay to answer
RETRY = 0.02  # seconds
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = [sys.executable, "-u", "-m", "ascend_runtime.engine.worker"]  # the rank proper
SHARED_STORE = (
    "torchrun shares its store between starts of the ranks. When it is itself started again on one machine, ranks may "
    "take minutes to come back. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all machines."
)
CUDA_DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def enter(arguments: Sequence[str]) -> None:
    """Connects to the relay and becomes the rank proper. Ends the process if that is not possible."""
    parent = os.getppid()
    die_with(parent)
    options = parser().parse_args(arguments)
    try:
        _require_torchrun()
        kind = kind_of_device(options.device)
        environment = environment_of_rank(kind, parent)
        control = _connected(options, kind, parent)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        time.sleep(pause_before_failing(_restart()))
        sys.exit(1)
    os.set_inheritable(control, True)
    environment |= {
        "ASCEND_RUNTIME_DEVICE": kind,
        "ASCEND_RUNTIME_CONTROL_FD": str(control),
        "ASCEND_RUNTIME_PARENT": str(parent),
        "ASCEND_RUNTIME_MACHINE": options.machine,
    }
    os.execve(PROGRAM[0], PROGRAM, environment)


def parser() -> argparse.ArgumentParser:
    """The options of a rank that torchrun starts."""
    made = argparse.ArgumentParser(
        prog="torchrun ... -m ascend_runtime.engine.worker",
        description="A rank of a cluster. Start it with torchrun on each machine (docs/machines.md).",
    )
    made.add_argument("--client", required=True, type=_address, metavar="HOST:PORT", help="where ComfyUI listens")
    made.add_argument("--key", required=True, help="the cluster's key file")
    made.add_argument("--machine", type=_machine, default=socket.gethostname(), help="this machine's name in messages "
                      "and in the cluster's file (default: the host's name)")  # fmt: skip
    made.add_argument("--device", choices=("auto", "npu", "cuda", "cpu"), default="auto")
    made.add_argument("--wait", type=_seconds, default=DEFAULT_WAIT, metavar="SECONDS", help="how long ranks wait "
                      f"without a client before they end; 0: for ever (default: {DEFAULT_WAIT})")  # fmt: skip
    return made


def _address(text: str) -> str:
    try:
        address_of(text, "--client")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _machine(text: str) -> str:
    try:
        require_name(text, "--machine")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


def _require_torchrun() -> None:
    if missing := [name for name in OF_TORCHRUN if not os.environ.get(name, "").strip()]:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start the ranks of a machine with "
            "torchrun: torchrun --nnodes ... --nproc-per-node ... -m ascend_runtime.engine.worker ..."
        )


def kind_of_device(given: str) -> str:
    """The kind of this machine's devices: "npu", "cuda" or "cpu". Raises ValueError if ranks cannot use it."""
    kind = given
    if given == "auto":
        kind = "npu" if host.visible_cards(os.environ) else "cuda" if _has_cuda() else "cpu"
    ranks, cards = int(os.environ["LOCAL_WORLD_SIZE"]), host.visible_cards(os.environ)
    if kind == "npu":
        host.require_npu(os.environ)
        if ranks > cards:
            raise coded_error("AV-1904", f"--nproc-per-node is {ranks}, but this machine has {cards} visible NPU(s).")
    return kind


def _has_cuda() -> bool:
    """Whether torch sees CUDA devices. Asks it, which takes seconds, only where a driver is."""
    if not any(file.exists() for file in CUDA_DRIVER):
        return False
    from ...hardware import devices

    return devices.count_visible("cuda") > 0


def environment_of_rank(kind: str, parent: int) -> dict[str, str]:
    """The rank's environment: as if a client had started it, for weights that FSDP2 shards, and with the interface that
    leads to the other machines. Raises ValueError."""
    given = dict(os.environ)
    if THREADS_VARIABLE not in first_environment_of(parent):
        given.pop(THREADS_VARIABLE, None)  # torchrun sets 1 where the user has set nothing
    environment = rank_environment(kind, given, {}, sharded=True)
    machines = int(given.get("GROUP_WORLD_SIZE", "1"))
    interfaces = interfaces_towards(given["MASTER_ADDR"], machines, environment)
    return variables_of_ranks(kind, int(given["LOCAL_WORLD_SIZE"]), environment, interfaces, {})


def first_environment_of(process: int) -> Mapping[str, str]:
    """The environment that a process was started with; empty if it may not be read."""
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in entries if entry)


# The relay


def _connected(options: argparse.Namespace, kind: str, parent: int) -> int:
    """The descriptor of this rank's connection to its machine's relay, which the first rank starts."""
    name = name_of_socket(parent, _restart())
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if local_rank == 0:
        if os.environ.get("GROUP_WORLD_SIZE") != "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            print(SHARED_STORE, file=sys.stderr, flush=True)
        with _listener(name) as listener:
            _start_relay(options, kind, rank, listener)
    connection = _connection(name, parent)
    packets, body = Packets(connection), msgspec.msgpack.encode(Arrival(rank=rank))
    try:
        packets.post(header(body, 0, 0) + body, [])
        packets.wait(select.POLLIN, time.monotonic() + RELAY_DEADLINE)
        packets.take()  # the relay's answer
    except (ChannelClosed, TimeoutError):
        raise coded_error("AV-1911", "This machine's relay has ended or does not answer; see its output.") from None
    return connection.detach()


def _listener(name: str) -> socket.socket:
    """The socket that the machine's ranks connect to; an abstract one, which ends with the relay."""
    deadline = time.monotonic() + NAME_DEADLINE
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            listener.bind(name)
            listener.listen(int(os.environ["LOCAL_WORLD_SIZE"]))
            return listener
        except OSError as error:
            if time.monotonic() > deadline:
                text = f"The name of this machine's relay, {name[1:]}, is in use by another process ({error})."
                raise coded_error("AV-1911", f"{text} Start torchrun again.") from None
        time.sleep(RETRY)


def _restart() -> int:
    """How often torchrun has started these ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _start_relay(options: argparse.Namespace, kind: str, first: int, listener: socket.socket) -> None:
    settings = RelaySettings(
        client=options.client,
        key=os.path.abspath(os.path.expanduser(options.key)),
        machine=options.machine,
        wait=options.wait,
        device=kind,
        first=first,
        ranks=int(os.environ["LOCAL_WORLD_SIZE"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        listener=listener.fileno(),
        parent=os.getpid(),
        restart=_restart(),
    )
    try:
        subprocess.Popen(
            [sys.executable, "-m", "ascend_runtime.engine.machine.relay", msgspec.json.encode(settings).decode()],
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to torchrun's processes reaches it through its first rank only
        )
    except OSError as error:
        raise coded_error("AV-1911", f"This machine's relay cannot be started ({error}).") from None


def _connection(name: str, parent: int) -> socket.socket:
    """A connection to the relay that torchrun's first rank on this machine started, and no earlier one's."""
    deadline = time.monotonic() + RELAY_DEADLINE
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)  # the relay of ranks that have ended may not accept any more
        try:
            connection.connect(name)
        except (ConnectionRefusedError, BlockingIOError):
            connection.close()  # the first rank has not opened it yet
        else:
            process, user = peer_of(connection)  # of the rank that opened the socket
            if user != os.getuid():
                raise coded_error("AV-1911", f"The name of this machine's relay, {name[1:]}, belongs to user {user}.")
            if process == os.getpid() or parent_of(process) == parent:
                return connection
            connection.close()  # of a rank that has ended, whose relay is about to
        time.sleep(RETRY)
    raise coded_error(
        "AV-1911", f"This machine's first rank has started no relay within {RELAY_DEADLINE:.0f} s; see its output."
    )
