"""Starts, watches and stops the processes of a group of ranks.

Each rank is `python -m ascend_runtime.engine.worker` with torchrun's environment variables. One thread per group
starts the ranks, reads their output and watches for their death. It lives as long as they do, because the kernel kills
a rank when the thread that started it ends (see engine/worker.py).
"""

from __future__ import annotations

import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from ..errors import coded
from ..hardware import host, memory
from ..hardware.environment import rank_environment, start_deadline, suits_sharded
from ..hardware.ranks import variables_of_ranks
from ..wire.channel import Channel, ChannelClosed, channel_pair
from ..wire.messages import Ready, Shutdown, Undecodable
from ..wire.shared_memory import blocks
from . import restarts
from .links import COMPUTING, ChannelLink

logger = logging.getLogger(__name__)
restarts.reap()

PACK_ROOT = Path(__file__).resolve().parents[2]
STOP_DEADLINE = 3.0  # seconds for a rank to end by itself before SIGTERM
TERM_DEADLINE = 1.0  # seconds between SIGTERM and SIGKILL
KILL_DEADLINE = 5.0  # seconds to wait after SIGKILL, as a driver may delay the end of a process
START_POLL = 0.05  # seconds between checks while ranks start
WATCH_POLL = 0.25  # seconds between checks for ranks that have ended
ENDING_POLL = 0.005  # the same, after a rank has closed its output
LAST_LINES = 60  # lines of a rank's output that an error may quote
MAX_LINE_BYTES = 65536  # a longer line keeps only its last bytes
OF_ONE_HOST = {
    "PYTHONSAFEPATH": "",  # a rank imports this package from its working directory
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
STATES = {  # proc_pid_stat(5)
    "R": COMPUTING,
    "S": "is waiting",
    "D": "is waiting in the kernel, as for a disk or a driver",
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
}


class RankDied(RuntimeError):
    """A rank died. The next job starts a new group."""


@dataclass
class Rank:
    """The process of a rank and its connections to the client."""

    rank: int
    process: subprocess.Popen
    channel: Channel
    output: int  # file descriptor of its stdout and stderr
    unfinished: bytes = b""  # the incomplete last line of its output
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    def log(self, line: bytes) -> None:
        """Logs a line of the rank's output."""
        text = line.decode(errors="replace")
        self.last_lines.append(text)
        logger.info("rank %d | %s", self.rank, text)

    @property
    def doing(self) -> str:
        """The state of the process, such as "is waiting", from /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "has ended"
        return STATES.get(stat.rpartition(")")[2].split()[0], "has ended")

    @property
    def ended(self) -> bool:
        """Whether the process has ended. Does not reap it, so that its id is not reused before the watcher does."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # reaped

    def signal_family(self, sign: signal.Signals) -> None:
        """Sends a signal to the rank's process group, which includes processes that it started."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, sign)
            except ProcessLookupError:
                pass  # all gone


class RankGroup:
    """Ranks of this machine that start and end together. `ranks[i].channel` is the control connection of rank i.

    sharded: whether their environment is for weights that FSDP2 shards.
    """

    def __init__(self, world_size: int, kind: str, environment: dict[str, str] | None = None, sharded: bool = False):
        self.world_size = world_size
        self.kind = kind
        self.ranks: list[Rank] = []
        self.links: list[ChannelLink] = []
        self._own = environment or {}
        self._environment = rank_environment(kind, os.environ, self._own, sharded)
        self._variables = variables_of_ranks(kind, world_size, self._environment, OF_ONE_HOST, self._own)
        self._start_deadline = start_deadline(self._environment)  # seconds until all ranks are ready
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._death: str | None = None
        self.kills_before = memory.kills()  # by the kernel, when the running job began
        self._ready = False
        self._stopping = False
        self._pid = os.getpid()  # to recognise a forked child, which does not own the ranks
        self._watcher = threading.Thread(target=self._start_and_watch, name="ascend-ranks", daemon=True)

    def start(
        self, check: Callable[[], None] = lambda: None, on_notice: Callable[[str], None] = lambda text: None
    ) -> None:
        """Starts the ranks and returns when all are ready. Raises RankDied with a rank's last output, TimeoutError, or,
        before a rank is started, ValueError if this host's NPUs cannot be used.

        check: called while waiting. If it raises, the ranks are ended and the exception is raised here.
        """
        if self.kind == "npu":
            host.require_npu(self._environment)
        deadline = time.monotonic() + self._start_deadline
        self._watcher.start()
        try:
            while not self._started.wait(START_POLL):
                check()
            if self._start_error:
                raise self._start_error
            for rank in self.ranks:
                self._await_ready(rank, deadline, check)
        except BaseException:
            self.kill()
            raise
        self._ready = True

    @property
    def alive(self) -> bool:
        """Whether these ranks can run a job. Detects deaths that the watcher has not noticed yet."""
        if not self._ready or self._stopping or self.lost:
            return False
        return not any(rank.ended for rank in self.ranks)

    @property
    def may_shard(self) -> bool:
        """Whether these ranks' environment suits weights that FSDP2 shards."""
        return suits_sharded(self.kind, self._environment)

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, in order."""
        return [rank.process.pid for rank in self.ranks]

    def doing(self, rank: int) -> str:
        """The state of a rank's process, such as "is waiting"."""
        return self.ranks[rank].doing

    @property
    def lost(self) -> bool:
        """Whether a rank has died unexpectedly."""
        return self._death is not None

    def died(self, doing: str) -> RankDied:
        """The error for a job that lost a rank. Waits for the watcher to find out which one."""
        self._watcher.join(timeout=1.5)
        death = self._death or coded("AV-1504", "A rank closed its control connection.")
        return RankDied(f"{death}\nThis happened during: {doing}. The next job starts a new group of ranks.")

    def stop(self) -> None:
        """Ends the ranks: by a message, then SIGTERM, then SIGKILL, each with a deadline."""
        self._stopping = True
        for rank in self.ranks:
            try:
                rank.channel.send(Shutdown(), timeout=0)
            except (ChannelClosed, OSError):
                pass  # it has ended already, or does not read, and gets the signals
        self._end(STOP_DEADLINE)

    def abandon(self) -> None:
        """Kills the ranks without waiting for their end; called when this object is garbage-collected."""
        if os.getpid() == self._pid:
            self._stopping = True
            self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """Kills the ranks."""
        self._stopping = True
        self._end(0)

    def _end(self, patience: float) -> None:
        self._watcher.join(timeout=patience)
        for sign, seconds in ((signal.SIGTERM, TERM_DEADLINE if patience else 0), (signal.SIGKILL, KILL_DEADLINE)):
            if self._watcher.is_alive():
                self._signal(sign)
                self._watcher.join(timeout=seconds)
        for rank in self.ranks:
            rank.channel.close()
        blocks.forget()

    def _signal(self, sign: signal.Signals) -> None:
        for rank in self.ranks:
            rank.signal_family(sign)

    def _await_ready(self, rank: Rank, deadline: float, check: Callable[[], None]) -> None:
        try:
            while (message := rank.channel.take()) is None:
                rank.channel.poll(START_POLL)
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(self._late(rank))
        except ChannelClosed:
            raise self.died("the start of the ranks") from None
        except Undecodable as error:
            raise RuntimeError(coded("AV-1507", f"Rank {rank.rank} sent an invalid first message. {error}")) from None
        if not isinstance(message, Ready) or message.rank != rank.rank:
            name = type(message).__name__
            raise RuntimeError(coded("AV-1507", f"Rank {rank.rank} sent {name} as its first message instead of Ready."))

    def _late(self, rank: Rank) -> str:
        lines = "\n".join(rank.last_lines)
        return host.advise(
            f"Rank {rank.rank} of {self.world_size} was not ready within {self._start_deadline:.0f} s. Set "
            f"ASCEND_RUNTIME_START_DEADLINE to wait longer. Its last output:\n{lines}",
            "AV-1505",
        )

    # The watcher's thread

    def _start_and_watch(self) -> None:
        try:
            self._start_all()
        except BaseException as error:
            self._start_error = error
            self._signal(signal.SIGKILL)
        self._started.set()
        if self._stopping:  # stopped during the start, when some ranks did not exist yet
            self._signal(signal.SIGKILL)
        self._watch()

    def _start_all(self) -> None:
        store = os.memfd_create("ascend-store")  # the ranks' rendezvous: an anonymous memory file instead of a port
        try:
            for rank in range(self.world_size):
                if not self._stopping:
                    self.ranks.append(self._start_one(rank, store))
                    self.links.append(ChannelLink(rank, self.ranks[-1].channel))
        finally:
            os.close(store)

    def _start_one(self, rank: int, store: int) -> Rank:
        with ExitStack() as theirs, ExitStack() as on_failure:
            channel, their_channel = channel_pair()
            output, their_output = os.pipe()
            theirs.callback(their_channel.close)
            theirs.callback(os.close, their_output)
            on_failure.callback(channel.close)
            on_failure.callback(os.close, output)
            process = subprocess.Popen(
                [sys.executable, "-m", "ascend_runtime.engine.worker"],
                cwd=PACK_ROOT,
                env=self._rank_environment(rank, their_channel.fileno(), store),
                pass_fds=(their_channel.fileno(), store),
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C reaches only the client, and signal_family reaches all children
            )
            on_failure.pop_all()
        os.set_blocking(output, False)
        restarts.remember(process.pid)
        return Rank(rank, process, channel, output)

    def _rank_environment(self, rank: int, control: int, store: int) -> dict[str, str]:
        return {
            **self._variables,
            # All ranks see the same devices, and each uses the one of its local rank. torch_npu enables peer-to-peer
            # access and divides CPU cores by the card's index (its NPUPeerToPeerAccess.h, NPUAffinityController.h). A
            # rank that saw only its own card would be card 0 of 1. A user's ASCEND_RT_VISIBLE_DEVICES is kept: the
            # driver numbers those cards from 0.
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",  # part of torch_npu's log names
            "ASCEND_RUNTIME_DEVICE": self.kind,
            "ASCEND_RUNTIME_CONTROL_FD": str(control),
            "ASCEND_RUNTIME_STORE_FD": str(store),
            "ASCEND_RUNTIME_PARENT": str(os.getpid()),
        }

    def _watch(self) -> None:
        """Forwards the ranks' output until all have ended. If one dies unexpectedly, kills the others.

        A rank's end usually closes its output, unless another process that it started keeps it open.
        """
        living = list(self.ranks)
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.output, selectors.EVENT_READ, rank)
            while living:
                ending = len(selector.get_map()) < len(living)
                for key, _ in selector.select(ENDING_POLL if ending else WATCH_POLL):
                    if not self._forward(key.data):
                        selector.unregister(key.fd)
                for rank in [rank for rank in living if rank.ended]:
                    living.remove(rank)
                    self._forward(rank)  # its last output
                    self._bury(rank)
        for rank in self.ranks:
            os.close(rank.output)

    def _forward(self, rank: Rank) -> bool:
        """Logs complete lines of the rank's output; False at its end."""
        try:
            while data := os.read(rank.output, 65536):
                *lines, unfinished = re.split(rb"[\r\n]+", rank.unfinished + data)
                rank.unfinished = unfinished[-MAX_LINE_BYTES:]
                for line in filter(None, lines):
                    rank.log(line)
        except BlockingIOError:
            return True
        return False

    def _bury(self, rank: Rank) -> None:
        if rank.unfinished:
            rank.log(rank.unfinished)
        rank.signal_family(signal.SIGKILL)  # processes that it started may still run
        code = rank.process.wait()
        restarts.forget(rank.process.pid)
        if self._stopping or self.lost:
            return
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGKILL and memory.kills() > self.kills_before:
            how += f", {host.BY_THE_KERNEL}"
        lines = "\n".join(rank.last_lines) or "(nothing)"
        death = f"Rank {rank.rank} of {self.world_size} {how}. Its last output:\n{lines}"
        self._death = host.advise(death, "AV-1503" if code < 0 else "AV-1504")
        logger.error("%s", self._death)
        self._signal(signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # some real-time signals have none
        return f"signal {number}"
