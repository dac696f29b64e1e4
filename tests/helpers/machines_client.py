"""A client of machines for tests: one listening socket, and a link to each machine that connects."""

import select
import socket
import time

import msgspec
from ascend_runtime.wire.envelopes import Deliver, FromRank, Here, Region, Welcome
from ascend_runtime.wire.link import Link, keep_alive
from ascend_runtime.wire.tls import Handshake, read_key

DEADLINE = 60.0  # seconds


class MachinesClient:
    """A context manager. port: to listen at; 0: any. answer: to each Hello."""

    def __init__(self, key, port=0, answer=Welcome()):
        self.key_file, self.key, self.answer = key, read_key(key), answer
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.machines = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for machine in self.machines:
            machine.link.close()
        self.listener.close()

    def accept(self, seconds=DEADLINE):
        """The next machine that connects, which has been welcomed. Raises ValueError if it has another key."""
        self.listener.settimeout(seconds)
        handshake = Handshake(self.listener.accept()[0], self.key, server=True)
        while (established := handshake.step()) is None:
            _wait(handshake.fileno(), handshake.events, seconds)
        keep_alive(established, 8)
        machine = ConnectedMachine(established)
        self.machines.append(machine)
        machine.hello = machine.take(seconds)
        machine.link.post(self.answer)
        return machine


class ConnectedMachine:
    """The link to one machine. lent: number -> a bytearray, into which regions of its tensor go."""

    def __init__(self, established):
        self.link = Link(established, self._place)
        self.lent = {}
        self.payload = []

    def take(self, seconds=DEADLINE):
        """The next envelope; a FromRank's message is then in `message`. Raises TimeoutError and LinkClosed."""
        until = time.monotonic() + seconds
        while (envelope := self.link.take()) is None:
            if not self.link.waiting:
                events = select.POLLIN | (select.POLLOUT if self.link.unsent else 0)
                _wait(self.link.fileno(), events, until - time.monotonic())
            self.link.flush()
        if isinstance(envelope, FromRank):
            self.message = msgspec.msgpack.decode(self.payload[0])
            self.block = self.payload[1] if envelope.block else b""
        return envelope

    def ready(self, ranks, seconds=DEADLINE):
        """Waits until these ranks are here and ready. Returns their groups' names."""
        here, groups = set(), {}
        while set(groups) != set(ranks):
            envelope = self.take(seconds)
            if isinstance(envelope, Here):
                here.add(envelope.rank)
            elif isinstance(envelope, FromRank):
                assert self.message["type"] == "Ready" and envelope.rank in here
                groups[envelope.rank] = self.message["group"]
        return set(groups.values())

    def say(self, ranks, message, job=0, block=b"", lent=()):
        """message: a dictionary, or an encoded body."""
        body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        envelope = Deliver(ranks=tuple(ranks), job=job, body=len(body), block=len(block), lent=tuple(lent))
        self.lent = {number: bytearray(size) for number, size in enumerate(lent)}
        self.link.post(envelope, body, block)

    def answers(self, ranks, seconds=DEADLINE):
        """rank -> its message of the types Done and Failed; what comes before is dropped, but regions."""
        found = {}
        while set(found) != set(ranks):
            envelope = self.take(seconds)
            if isinstance(envelope, Region):
                self._fill(envelope)
            elif isinstance(envelope, FromRank) and self.message["type"] in ("Done", "Failed"):
                found[envelope.rank] = self.message
        return found

    def _place(self, envelope):
        if isinstance(envelope, FromRank):
            self.payload = [bytearray(envelope.body), bytearray(envelope.block)]
        else:
            assert isinstance(envelope, Region)
            size = envelope.itemsize
            for side in envelope.sizes:
                size *= side
            self.payload = [bytearray(size)]
        return [memoryview(part) for part in self.payload]

    def _fill(self, region):
        import torch

        whole = torch.frombuffer(self.lent[region.lent], dtype=torch.uint8).view(*region.shape, region.itemsize)
        place = tuple(slice(start, start + size) for start, size in zip(region.starts, region.sizes))
        part = torch.frombuffer(self.payload[0], dtype=torch.uint8).view(*region.sizes, region.itemsize)
        whole[place] = part


def _wait(descriptor, events, seconds):
    poll = select.poll()
    poll.register(descriptor, events)
    if seconds <= 0 or not poll.poll(1000 * seconds):
        raise TimeoutError("nothing came")
