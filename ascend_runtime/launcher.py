"""The processes of a group of ranks: start, ready, watch, stop.

Each rank is `python -m ascend_runtime.worker` under torchrun's environment contract. One thread a group starts
the ranks, reads what they print and watches them die; it lives as long as they do, which lets every rank ask
the kernel to be killed with it (see worker.py).
"""

from __future__ import annotations

import logging
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from .protocol import Ready, Shutdown
from .transport import Channel, ChannelClosed, channel_pair

logger = logging.getLogger(__name__)

PACK_ROOT = Path(__file__).resolve().parent.parent
START_DEADLINE = float(os.environ.get("ASCEND_RUNTIME_START_DEADLINE", 300))  # seconds until all ranks are ready
STOP_DEADLINE = 3.0  # seconds to leave by itself, after which a rank gets SIGTERM
TERM_DEADLINE = 1.0  # seconds after SIGTERM, after which it gets SIGKILL
LAST_WORDS = 60  # lines of a rank's output that an error may quote


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


class RankGroup:
    """Ranks that live and die together. `ranks[i].channel` is the control connection of rank i."""

    def __init__(self, world_size: int, kind: str, environment: dict[str, str] | None = None):
        self.world_size = world_size
        self.kind = kind
        self.ranks: list[Rank] = []
        self._environment = environment or {}
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._death: str | None = None
        self._stopping = False
        self._watcher = threading.Thread(target=self._start_and_watch, name="ascend-ranks", daemon=True)

    def start(self) -> None:
        """Returns when every rank is ready; raises RankDied with a rank's last words, or TimeoutError."""
        deadline = time.monotonic() + START_DEADLINE
        self._watcher.start()
        self._started.wait()
        if self._start_error:
            raise self._start_error
        try:
            for rank in self.ranks:
                self._await_ready(rank, deadline)
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        """Whether a job may be given to these ranks; a death that the watcher is yet to see counts as one."""
        if self._death is not None or self._stopping or not self._watcher.is_alive():
            return False
        return all(rank.process.poll() is None for rank in self.ranks)

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
                rank.channel.send(Shutdown())
            except (ChannelClosed, OSError):
                pass  # already gone, which is what we want
        self._end(STOP_DEADLINE)

    def kill(self) -> None:
        """Ends the ranks without asking."""
        self._stopping = True
        self._end(0)

    def _end(self, patience: float) -> None:
        self._watcher.join(timeout=patience)
        for sign, patience in ((signal.SIGTERM, TERM_DEADLINE if patience else 0), (signal.SIGKILL, 5.0)):
            if self._watcher.is_alive():
                self._signal(sign)
                self._watcher.join(timeout=patience)
        for rank in self.ranks:
            rank.channel.close()

    def _signal(self, sign: signal.Signals) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(sign)

    def _await_ready(self, rank: Rank, deadline: float) -> None:
        if not rank.channel.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(
                f"Rank {rank.rank} of {self.world_size} was not ready within {START_DEADLINE:.0f} s. "
                "Set ASCEND_RUNTIME_START_DEADLINE to wait longer. It said last:\n" + "\n".join(rank.last_words)
            )
        try:
            message = rank.channel.receive()
        except ChannelClosed:
            raise self.died("the start of the ranks") from None
        assert isinstance(message, Ready) and message.rank == rank.rank, message

    # The watcher's thread

    def _start_and_watch(self) -> None:
        try:
            self._start_all()
        except BaseException as error:
            self._start_error = error
            self._signal(signal.SIGKILL)
        self._started.set()
        self._watch()

    def _start_all(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=self.world_size) as rendezvous:
            for rank in range(self.world_size):
                self.ranks.append(self._start_one(rank, rendezvous))

    def _start_one(self, rank: int, rendezvous: socket.socket) -> Rank:
        channel, theirs = channel_pair()
        output, their_output = os.pipe()
        inherited = [theirs.fileno()] + ([rendezvous.fileno()] if rank == 0 else [])
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ascend_runtime.worker"],
                cwd=PACK_ROOT,
                env=self._rank_environment(rank, theirs.fileno(), rendezvous),
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(their_output)
        return Rank(rank, process, channel, output)

    def _rank_environment(self, rank: int, control: int, rendezvous: socket.socket) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self.world_size)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            **self._environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(rendezvous.getsockname()[1]),
            "ASCEND_RUNTIME_DEVICE": self.kind,
            "ASCEND_RUNTIME_CONTROL_FD": str(control),
            "ASCEND_RUNTIME_PARENT": str(os.getpid()),
        }
        if rank == 0:
            environment["ASCEND_RUNTIME_LISTEN_FD"] = str(rendezvous.fileno())
        return environment

    def _watch(self) -> None:
        """Forwards what the ranks print until all are gone; the first that dies unasked takes the others along."""
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.output, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._forward(key.data):
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        self._bury(key.data)

    def _forward(self, rank: Rank) -> bool:
        """Logs the rank's lines; False at the end of its output, which is its death."""
        data = os.read(rank.output, 65536)
        *lines, rank.unfinished = re.split(rb"[\r\n]+", rank.unfinished + (data or b"\n"))
        for line in filter(None, lines):
            text = line.decode(errors="replace")
            rank.last_words.append(text)
            logger.info("rank %d | %s", rank.rank, text)
        return bool(data)

    def _bury(self, rank: Rank) -> None:
        code = rank.process.wait()
        if self._stopping or self._death is not None:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        words = "\n".join(rank.last_words) or "(nothing)"
        self._death = f"Rank {rank.rank} of {self.world_size} {how}. Its last words:\n{words}"
        logger.error("%s", self._death)
        self._signal(signal.SIGKILL)
