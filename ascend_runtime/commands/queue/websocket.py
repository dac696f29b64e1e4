"""Reads progress from ComfyUI's websocket in a thread. Jobs do not depend on it."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

import websocket

from . import QueueError
from .answers import WebsocketMessage
from .http import Connection, reason
from .screen import one_line
from .typed import NotUnderstood, decode_json

CONNECT_S = 10.0
AGAIN_S = 5.0  # between two attempts to connect
LARGEST_HANDSHAKE = 16 << 10  # bytes
LARGEST_MESSAGE = 64 << 20  # bytes; previews are images
MOST_WAITING = 1000  # buffered messages; when the buffer is full, the socket is not read


class WebsocketListener:
    """Receives messages for a client of the server of `connection`. warn: called once if there is no connection."""

    def __init__(self, connection: Connection, client_id: str, warn: Callable[[str], None]):
        self._connection, self._client_id, self._warn = connection, client_id, warn
        self._messages: queue.Queue[WebsocketMessage | QueueError] = queue.Queue(MOST_WAITING)
        self._socket: websocket.WebSocket | None = None
        self._tried, self._closed, self._warned = threading.Event(), threading.Event(), False

    def start(self) -> None:
        """Starts to listen, and waits up to CONNECT_S for the connection."""
        threading.Thread(target=self._run, daemon=True).start()
        self._tried.wait(CONNECT_S)

    def close(self) -> None:
        self._closed.set()
        if self._socket:
            self._socket.shutdown()

    def next(self, seconds: float) -> WebsocketMessage | None:
        """The next message; None if none arrives within `seconds`."""
        try:
            message = self._messages.get(timeout=seconds)
        except queue.Empty:
            return None
        if not isinstance(message, QueueError):
            return message
        if not self._warned:
            self._warn(f"warning: {message}")
        self._warned = True
        return None

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except Exception as error:  # a malicious server can make the library raise anything
                self._complain(f"{_words(error)}. Jobs also run without it")
            self._closed.wait(AGAIN_S)

    def _listen(self) -> None:
        try:
            bounded = _Bounded(self._open())
            self._socket = websocket.create_connection(
                f"{self._connection.address.websocket}/ws?clientId={self._client_id}", timeout=CONNECT_S,
                socket=bounded, redirect_limit=0, suppress_origin=True,  # ComfyUI's host differs behind a proxy
                header=[f"{name}: {value}" for name, value in self._connection.headers.items()])
            self._socket.settimeout(None)
        finally:
            self._tried.set()
        while not self._closed.is_set():
            bounded.left = LARGEST_MESSAGE
            text = self._socket.recv()
            if text == "":
                raise QueueError("it has closed its websocket")
            if isinstance(text, str):  # not a preview
                self._take(text)

    def _take(self, text: str) -> None:
        try:
            self._messages.put(decode_json(text, WebsocketMessage))
        except NotUnderstood as error:
            self._complain(f"a message is invalid: {one_line(error, 200)}")

    def _complain(self, why: str) -> None:
        if not self._closed.is_set():
            self._messages.put(QueueError(f"{self._connection.address.url} reports no progress: {why}."))

    def _open(self) -> socket.socket:
        """Opens the connection, as websocket-client would use a proxy from the environment even for 127.0.0.1."""
        address = self._connection.address
        plain = socket.create_connection((address.host, address.port), timeout=CONNECT_S)
        try:
            tls = self._connection.tls
            return tls.wrap_socket(plain, server_hostname=address.host) if tls else plain
        except OSError:
            plain.close()
            raise


class _Bounded:
    """A socket from which at most `left` bytes are read, as websocket-client does not limit the size of messages."""

    def __init__(self, connection: socket.socket):
        self._connection, self.left = connection, LARGEST_HANDSHAKE

    def __getattr__(self, name: str):
        return getattr(self._connection, name)

    def recv(self, size: int) -> bytes:
        data = self._connection.recv(size)
        self.left -= len(data)
        if self.left < 0:
            raise QueueError("a message is too large")
        return data


def _words(error: Exception) -> str:
    if isinstance(error, websocket.WebSocketBadStatusException):
        return f"its websocket answers with status {error.status_code}"
    if isinstance(error, OSError):
        return reason(error)
    return one_line(error or type(error).__name__, 200)
