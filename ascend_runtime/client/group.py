"""The processes of a group of ranks: start, ready, watch, stop.

Each rank is `python -m ascend_runtime.engine.worker`, with torchrun's variables for its place in the group. One
thread a group starts the ranks, reads what they print and watches them die; it lives as long as they do, which lets
every rank ask the kernel to be killed with it (see engine/worker.py).
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

from ..hardware import cores, host
from ..hardware.environment import HEAP, rank_environment, start_deadline
from ..wire.channel import Channel, ChannelClosed, channel_pair
from ..wire.messages import Ready, Shutdown, Undecodable
from . import restarts

logger = logging.getLogger(__name__)
restarts.reap()

PACK_ROOT = Path(__file__).resolve().parents[2]
STOP_DEADLINE = 3.0  # seconds to leave by itself, after which a rank gets SIGTERM
TERM_DEADLINE = 1.0  # seconds after SIGTERM, after which it gets SIGKILL
KILL_DEADLINE = 5.0  # seconds after SIGKILL, which a process that waits in a driver obeys when that lets it
START_POLL = 0.05  # seconds between looks while ranks start
WATCH_POLL = 0.25  # seconds between looks for ranks that have ended without a sign
ENDING_POLL = 0.005  # the same, once a rank's output has ended
LAST_WORDS = 60  # lines of a rank's output that an error may quote
LONGEST_LINE = 65536  # bytes; more than that without a line's end is not kept
COMPUTING = "is computing"
STATES = {  # proc_pid_stat(5)
    "R": COMPUTING,
    "S": "is waiting",
    "D": "is waiting in the kernel, as for a disk or a driver",
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
}


class RankDied(RuntimeError):
    """A rank ended while it was needed. The next job starts a new group."""


@dataclass
class Rank:
    """A rank as its starter sees it."""

    rank: int
    process: subprocess.Popen
    channel: Channel
    output: int  # file descriptor of what it prints
    unfinished: bytes = b""  # the line that it has begun to print
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))

    def say(self, line: bytes) -> None:
        """Logs a line that the rank printed."""
        text = line.decode(errors="replace")
        self.last_words.append(text)
        logger.info("rank %d | %s", self.rank, text)

    @property
    def doing(self) -> str:
        """What the process is seen to do, as far as the kernel knows."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "has ended"
        return STATES.get(stat.rpartition(")")[2].split()[0], "has ended")

    @property
    def ended(self) -> bool:
        """Whether the process has ended; it is left to the watcher to reap, which keeps its id from being reused."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # reaped

    def signal_family(self, sign: signal.Signals) -> None:
        """Sends a signal to the rank and to what it started: it leads a process group of its own."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, sign)
            except ProcessLookupError:
                pass  # all gone


class RankGroup:
    """Ranks that live and die together. `ranks[i].channel` is the control connection of rank i."""

    def __init__(self, world_size: int, kind: str, environment: dict[str, str] | None = None):
        self.world_size = world_size
        self.kind = kind
        self.ranks: list[Rank] = []
        self._own = environment or {}
        self._environment = rank_environment(kind, os.environ, self._own)
        self._threads = cores.shared(world_size, self._environment)
        self._start_deadline = start_deadline(self._environment)  # seconds until all ranks are ready
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._death: str | None = None
        self._ready = False
        self._stopping = False
        self._pid = os.getpid()  # a forked child has this object too, and the ranks are not its own
        self._watcher = threading.Thread(target=self._start_and_watch, name="ascend-ranks", daemon=True)

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Returns when every rank is ready; raises RankDied with a rank's last words, TimeoutError, or, before a rank
        is started, ValueError where NPUs are wanted and this host has something that keeps them from working.

        check: asked while waiting; what it raises ends the ranks and is raised here.
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
        """Whether a job may be given to these ranks; a death that the watcher is yet to see counts as one."""
        if not self._ready or self._stopping or self.lost:
            return False
        return not any(rank.ended for rank in self.ranks)

    @property
    def lost(self) -> bool:
        """Whether a rank has died unasked."""
        return self._death is not None

    def died(self, doing: str) -> RankDied:
        """The error for a job that lost a rank while `doing` something; waits for the watcher to learn which."""
        self._watcher.join(timeout=1.5)
        death = self._death or "A rank closed its control connection."
        return RankDied(f"{death}\nThis happened during: {doing}. The next job starts a new group of ranks.")

    def stop(self) -> None:
        """Ends the ranks: a message, then SIGTERM, then SIGKILL, each with its deadline."""
        self._stopping = True
        for rank in self.ranks:
            try:
                rank.channel.send(Shutdown(), timeout=0)
            except (ChannelClosed, OSError):
                pass  # gone, which is what we want, or not reading, which the signals are for
        self._end(STOP_DEADLINE)

    def abandon(self) -> None:
        """Ends the ranks without asking, and without waiting: for where nobody holds this object any more."""
        if os.getpid() == self._pid:
            self._stopping = True
            self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """Ends the ranks without asking."""
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

    def _signal(self, sign: signal.Signals) -> None:
        for rank in self.ranks:
            rank.signal_family(sign)

    def _await_ready(self, rank: Rank, deadline: float, check: Callable[[], None]) -> None:
        try:
            while (message := rank.channel.take()) is None:
                rank.channel.poll(START_POLL)
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"Rank {rank.rank} of {self.world_size} was not ready within {self._start_deadline:.0f} s. Set "
                        "ASCEND_RUNTIME_START_DEADLINE to wait longer. It said last:\n" + "\n".join(rank.last_words)
                    )
        except ChannelClosed:
            raise self.died("the start of the ranks") from None
        except Undecodable as error:
            raise RuntimeError(f"Rank {rank.rank} began with what is no message. {error}") from None
        if not isinstance(message, Ready) or message.rank != rank.rank:
            raise RuntimeError(f"Rank {rank.rank} began with a {type(message).__name__}, where it was to be ready.")

    # The watcher's thread

    def _start_and_watch(self) -> None:
        try:
            self._start_all()
        except BaseException as error:
            self._start_error = error
            self._signal(signal.SIGKILL)
        self._started.set()
        if self._stopping:  # somebody gave up meanwhile, who saw only some of the ranks
            self._signal(signal.SIGKILL)
        self._watch()

    def _start_all(self) -> None:
        store = os.memfd_create("ascend-store")  # where the ranks meet: memory without a name, and no port
        try:
            for rank in range(self.world_size):
                if not self._stopping:
                    self.ranks.append(self._start_one(rank, store))
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
                start_new_session=True,  # the terminal's Ctrl+C is the client's; and its helpers can be ended with it
            )
            on_failure.pop_all()
        os.set_blocking(output, False)
        restarts.remember(process.pid)
        return Rank(rank, process, channel, output)

    def _rank_environment(self, rank: int, control: int, store: int) -> dict[str, str]:
        return {
            # Threads that wait must not burn the cores that ComfyUI and other ranks want: beside other load a decode
            # on two cores took 1.2 s so, and 3.9 s with threads that spin.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            **(HEAP if self.kind == "cpu" else {}),
            **self._environment,
            **self._threads,
            "PYTHONSAFEPATH": "",  # the rank finds its code by its working directory
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            **({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"} if self.kind == "npu" else {}),  # though ComfyUI may not want it
            **{name: value for name, value in self._own.items() if value},
            # All ranks see the same devices, and each takes that of its local rank. On NPUs this matters: torch_npu
            # opens direct access between cards, and divides the cores between ranks, by the cards' numbers in one
            # process (its NPUPeerToPeerAccess.h, NPUAffinityController.h); a rank that saw one card would be card 0 of
            # 1. A user's ASCEND_RT_VISIBLE_DEVICES stays: the driver numbers its cards from 0.
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",  # which torch_npu writes into its logs' names
            "ASCEND_RUNTIME_DEVICE": self.kind,
            "ASCEND_RUNTIME_CONTROL_FD": str(control),
            "ASCEND_RUNTIME_STORE_FD": str(store),
            "ASCEND_RUNTIME_PARENT": str(os.getpid()),
        }

    def _watch(self) -> None:
        """Forwards what the ranks print until all have ended; the first that dies unasked takes the others along.

        A rank's output mostly ends with it, but not where it has started something that holds it open.
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
                    self._forward(rank)  # its last words
                    self._bury(rank)
        for rank in self.ranks:
            os.close(rank.output)

    def _forward(self, rank: Rank) -> bool:
        """Logs the whole lines that the rank has printed; False at the end of its output."""
        try:
            while data := os.read(rank.output, 65536):
                *lines, unfinished = re.split(rb"[\r\n]+", rank.unfinished + data)
                rank.unfinished = unfinished[-LONGEST_LINE:]
                for line in filter(None, lines):
                    rank.say(line)
        except BlockingIOError:
            return True
        return False

    def _bury(self, rank: Rank) -> None:
        if rank.unfinished:
            rank.say(rank.unfinished)
        rank.signal_family(signal.SIGKILL)  # what it started may still be there
        code = rank.process.wait()
        restarts.forget(rank.process.pid)
        if self._stopping or self.lost:
            return
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        words = "\n".join(rank.last_words) or "(nothing)"
        self._death = host.advise(f"Rank {rank.rank} of {self.world_size} {how}. Its last words:\n{words}")
        logger.error("%s", self._death)
        self._signal(signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # some real-time signals have none
        return f"signal {number}"
