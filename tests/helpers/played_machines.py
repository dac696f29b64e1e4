"""Played machines: threads that speak with a client as a machine's relay does, over TLS on 127.0.0.1. No ranks work."""

import random
import select
import socket
import threading
import time

import msgspec
import torch
from ascend_runtime.hardware.versions import OWN_NAME, package_versions, versions
from ascend_runtime.wire.envelopes import (
    PROTOCOL,
    Deliver,
    FromRank,
    Gone,
    Hello,
    Here,
    Leave,
    Region,
    Rejected,
    Welcome,
)
from ascend_runtime.wire.link import Link, LinkClosed
from ascend_runtime.wire.messages import Done, Ready, encode
from ascend_runtime.wire.tls import Handshake, read_key

PATIENCE = 10.0  # seconds


def free_port():
    """Below those that the kernel gives to connections: an attempt to connect to such a one can meet itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def established(cluster, key=None):
    """A connection to the client of a cluster, with TLS by this key."""
    connection = socket.create_connection(cluster.address, timeout=PATIENCE)
    handshake = Handshake(connection, read_key(key or cluster.key), server=False)
    while (sock := handshake.step()) is None:
        wait(handshake.fileno(), handshake.events)
    return sock


def wait(descriptor, events, seconds=PATIENCE):
    poll = select.poll()
    poll.register(descriptor, events)
    assert poll.poll(1000 * seconds), "nothing came"


class PlayedMachine:
    """A machine with these ranks, which join at once. A context manager. Its thread comes again when the client goes.

    answer(machine, deliver, message): answers a job, whose message is a dictionary; by default, all its ranks are done.
    hello: what it says of itself besides. seen: envelopes from the client. ended: why the last connection did; empty
    once a client has welcomed it.
    """

    def __init__(self, cluster, name, ranks, *, group="group", answer=None, comes_again=True, **hello):
        self.cluster, self.name, self.ranks = cluster, name, tuple(ranks)
        self.group, self.restarts = group, 0  # torchrun's restarts; each gives the ranks another group
        self.answer = answer or (lambda machine, deliver, message: machine.done(deliver))
        self.comes_again = comes_again
        self.delay = 0.02  # seconds until it does
        self.hello = {
            "pack": versions()[OWN_NAME], "protocol": PROTOCOL, "machine": name, "ranks": self.ranks,
            "world_size": cluster.ranks, "device": "cpu", "packages": package_versions(), **hello,
        }  # fmt: skip
        self.seen, self.ended, self.welcomes = [], "", 0
        self.block = b""
        self.later = []  # calls for its own thread, with itself
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"played {name}", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.vanish()

    def vanish(self):
        """Closes the connection, and does not come again."""
        self._left.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    @property
    def group_now(self):
        return f"{self.group} {self.restarts}"

    def seen_of(self, kind):
        return [envelope for envelope in self.seen if isinstance(envelope, kind)]

    def until(self, condition, seconds=PATIENCE):
        """Waits until the condition of this machine holds."""
        end = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < end, f"{self.name} has seen {self.seen} and ended with {self.ended!r}"
            time.sleep(0.005)

    # What it says; from its own thread

    def say(self, rank, message):
        """Sends a message of a rank."""
        parcel = encode(message)
        block = bytearray(parcel.size)
        for offset, tensor in parcel.tensors:
            block[offset : offset + tensor.nbytes] = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        self.link.post(FromRank(rank=rank, body=len(parcel.body), block=len(block)), parcel.body, block)

    def done(self, deliver, **fields):
        for rank in deliver.ranks:
            self.say(rank, Done(job=deliver.job, **(fields if rank == 0 else {})))

    def write(self, job, whole, starts, sizes, lent=0, **lies):
        """Sends a part of a result."""
        part = whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes))].contiguous()
        region = {"job": job, "lent": lent, "shape": tuple(whole.shape), "starts": tuple(starts),
                  "sizes": tuple(sizes), "itemsize": whole.element_size()} | lies  # fmt: skip
        content = part.view(torch.uint8).flatten().numpy().tobytes()
        self.link.post(Region(**region), content)

    def bury(self, rank, by_kernel=False):
        self.link.post(Gone(rank=rank, by_kernel=by_kernel))

    def hang_up(self, ranks_end=True):
        """ranks_end: whether its ranks have ended, and not only its connection."""
        self.restarts += ranks_end
        raise LinkClosed("it hangs up")

    # Its thread

    def _run(self):
        while not self._left.is_set():
            try:
                self._serve(established(self.cluster))
            except (LinkClosed, OSError) as error:
                self.ended = str(error)
            if not self.comes_again:
                return
            self._left.wait(self.delay)

    def _serve(self, sock):
        self.link = Link(sock, self._place)
        try:
            self.link.post(Hello(**self.hello))
            while not self._left.is_set():
                poll = select.poll()
                poll.register(self.link.fileno(), select.POLLIN | (select.POLLOUT if self.link.unsent else 0))
                poll.poll(0 if self.link.waiting else 20)
                while self.later:
                    self.later.pop(0)(self)
                self.link.flush()
                if (envelope := self.link.take()) is not None:
                    self._heard(envelope)
        finally:
            self.link.close()

    def _heard(self, envelope):
        self.seen.append(envelope)
        if isinstance(envelope, Welcome):
            self.welcomes, self.ended = self.welcomes + 1, ""
            for rank in self.ranks:
                self.link.post(Here(rank=rank))
                self.say(rank, Ready(rank=rank, group=self.group_now))
        elif isinstance(envelope, Deliver) and envelope.job:
            self.answer(self, envelope, msgspec.msgpack.decode(self._body))
        elif isinstance(envelope, (Rejected, Leave)):
            self.restarts += isinstance(envelope, Leave)
            raise LinkClosed(envelope.reason)

    def _place(self, envelope):
        self._body, self.block = bytearray(envelope.body), bytearray(envelope.block)
        return [memoryview(self._body), memoryview(self.block)]
