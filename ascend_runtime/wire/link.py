"""Sends envelopes and their payloads between the client and a machine, over TLS. Does not import torch.

Large payloads are sent from where they lie, and received where they belong.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from .envelopes import AnyEnvelope, Envelope, payload_bytes
from .packets import Undecodable

_HEADER = struct.Struct("<4sI")  # magic, bytes of the envelope
_MAGIC = b"ASL1"  # the first bytes of each envelope, to detect a stream that is out of sync
MAX_ENVELOPE = 1 << 16  # bytes
MAX_PAYLOAD = 1 << 40  # bytes
_TOGETHER = 1 << 14  # bytes that are sent as one TLS record, even if they must be copied for it; as large as one can be
_PIECE = 1 << 18  # bytes that are sent or received by one call
_TURN = 1 << 22  # bytes that are sent or received before others have their turn

Placing = Callable[[Envelope], list[memoryview] | None]


class LinkClosed(EOFError):
    """The other side has disconnected, or the network has."""


def keep_alive(sock: socket.socket, user_timeout_s: float) -> None:
    """Sets a TCP socket's options, so that small envelopes go at once, and a connection ends on which the other side
    has not answered for `user_timeout_s` seconds, whether something was sent or not."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    # In place of a number of probes; also the limit for data that the other side does not take.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))


class Link:
    """One end of the connection between the client and a machine, after the TLS handshake. For one thread at a time.

    Never blocks. Wait with select.poll for POLLIN, and for POLLOUT if `unsent`; do not wait at all if `waiting`. Then
    call `flush`, and `take` until it returns None. An envelope is taken in turns of a few megabytes, so that a large
    one does not hold up other links. Every error of `take` closes the link.

    place: returns the memory for an envelope's payload, in which it is received without a copy; None to drop it. It is
    called as soon as the envelope has arrived, and may raise Undecodable. Not called without a payload.
    """

    def __init__(self, sock: ssl.SSLSocket, place: Placing):
        if sock.version() is None:
            raise ValueError("The TLS handshake is not done.")
        sock.setblocking(False)
        self._socket = sock
        self._place = place
        self._unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self._broken: OSError | None = None  # nothing can be sent any more
        self._blocked = False  # TLS must send something before it can receive more
        self._decoder = msgspec.msgpack.Decoder(AnyEnvelope)
        self._expect_header()

    def fileno(self) -> int:
        """-1 if the link is closed."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._unsent) or self._blocked

    @property
    def waiting(self) -> bool:
        """Whether `take` has something to do that poll does not show."""
        return self._broken is not None or self._socket.pending() > 0

    def post(self, envelope: Envelope, *payload) -> None:
        """Sends as much as possible without blocking; `flush` sends the rest.

        payload: contiguous buffers of `payload_bytes(envelope)` together. Their content must not change until it is
        sent (`unsent`).
        """
        body = msgspec.msgpack.encode(envelope)
        parts = _parts(payload, payload_bytes(envelope), envelope)
        if len(body) > MAX_ENVELOPE:
            raise ValueError(f"{type(envelope).__name__} has {len(body)} bytes; at most {MAX_ENVELOPE} can be sent.")
        head = bytearray(_HEADER.pack(_MAGIC, len(body)) + body)
        while parts and len(head) + len(parts[0]) <= _TOGETHER:
            head += parts.pop(0)
        for part in (memoryview(head), *parts):
            self._unsent.append(part)
            self.unsent_bytes += len(part)
        self.flush()

    def flush(self) -> None:
        """Sends posted data as far as possible without blocking. A connection that is gone is reported by `take`, after
        what the other side has sent before, such as the reason."""
        if self._broken is not None:
            self._drop()
        turn = _TURN
        try:
            while self._unsent and turn > 0:
                # After SSLWantWriteError OpenSSL must get the same bytes again: they stay the first of the queue.
                sent = self._socket.send(self._unsent[0][:_PIECE])
                self._sent(sent)
                turn -= sent
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._broken = error
            self._drop()
        except BaseException:  # between sending and its record
            self.close()
            raise

    def take(self) -> Envelope | None:
        """The next envelope, whose payload is where it belongs; None if it has not arrived completely.

        Raises LinkClosed, and Undecodable if the other side does not keep to the protocol.
        """
        self._turn = _TURN
        try:
            while self._fill():
                envelope = self._next(self)
                if envelope is not None:
                    return envelope
        except BaseException:
            self.close()
            raise
        return None

    def close(self) -> None:
        """Closes the connection; what is unsent is dropped."""
        self._drop()
        self._blocked = False
        self._expect_header()  # lets the payload's memory go
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # a process that was forked meanwhile has the descriptor too
        except OSError:
            pass  # the connection has ended already
        self._socket.close()

    def _drop(self) -> None:
        self._unsent.clear()
        self.unsent_bytes = 0

    def _sent(self, count: int) -> None:
        self.unsent_bytes -= count
        rest = self._unsent[0][count:]
        if rest:
            self._unsent[0] = rest
        else:
            self._unsent.popleft()

    def _fill(self) -> bool:
        """Receives what is missing. Returns whether all of it has arrived. Raises LinkClosed."""
        try:
            while self._missing and self._turn > 0:
                part = self._missing[0]
                count = self._socket.recv_into(part, min(len(part), _PIECE))  # of one TLS record at most
                if not count:
                    raise _closed(None)
                self._received(count)
        except ssl.SSLWantReadError:
            self._blocked = False
            if self._broken is not None:
                raise _closed(self._broken) from None
        except ssl.SSLWantWriteError:
            self._blocked = True
        except OSError as error:
            raise _closed(error) from error
        return not self._missing

    def _received(self, count: int) -> None:
        self._blocked = False
        self._turn -= count
        rest = self._missing[0][count:]
        if rest:
            self._missing[0] = rest
        else:
            self._missing.popleft()

    def _expect_header(self) -> None:
        self._buffer = bytearray(_HEADER.size)
        self._missing = deque([memoryview(self._buffer)])
        self._next = Link._read_header  # not bound, which would make a cycle that keeps the payload's memory

    def _read_header(self) -> None:
        magic, size = _HEADER.unpack(self._buffer)
        if magic != _MAGIC or not 0 < size <= MAX_ENVELOPE:
            raise Undecodable("The other side of the connection sent an invalid header.")
        self._buffer = bytearray(size)
        self._missing.append(memoryview(self._buffer))
        self._next = Link._read_envelope

    def _read_envelope(self) -> Envelope | None:
        try:
            envelope = self._decoder.decode(self._buffer)
            size = payload_bytes(envelope)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Undecodable(f"An envelope cannot be decoded ({error}).") from None
        if not 0 <= size <= MAX_PAYLOAD:
            raise Undecodable(f"{type(envelope).__name__} announces a payload that cannot be.")
        self._expect_header()
        if not size:
            return envelope
        self._missing = deque(self._places(envelope, size))
        self._envelope = envelope
        self._next = Link._arrived
        return None

    def _places(self, envelope: Envelope, size: int) -> list[memoryview]:
        places = self._place(envelope)
        if places is not None:
            return _parts(places, size, envelope)
        nowhere = memoryview(bytearray(min(size, _PIECE)))
        return [nowhere] * (size // _PIECE) + [nowhere[: size % _PIECE]] * (size % _PIECE > 0)

    def _arrived(self) -> Envelope:
        self._expect_header()
        return self._envelope


def _parts(payload: Iterable, size: int, envelope: Envelope) -> list[memoryview]:
    """The buffers of an envelope's payload, in bytes."""
    views = [memoryview(part) for part in payload]
    parts = [view.cast("B") for view in views if view.nbytes]
    if sum(map(len, parts)) != size:
        name = type(envelope).__name__
        raise ValueError(f"The payload of {name} has {size} bytes, and its memory {sum(map(len, parts))}.")
    return parts


def _closed(error: OSError | None) -> LinkClosed:
    reason = "" if error is None else f" ({getattr(error, 'reason', None) or error})"
    return LinkClosed(f"the other side of the connection is gone{reason}")
