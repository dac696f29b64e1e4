"""What ComfyUI tells a browser while it works: events and previews of a websocket, each with the time it came.

    with Listener(server) as listener:
        run = listener.run(graph)
        run.progress("8")  # [(1, 3), (2, 3), (3, 3)]
"""

import io
import json
import socket
import struct
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

import websocket
from PIL import Image

TEXT, PREVIEW_WITH_METADATA = 3, 4  # ComfyUI's protocol.BinaryEventTypes
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True)
class Event:
    """at: time.monotonic() when it came; kind: ComfyUI's name, or "preview" with the decoded `image` in data, or "text"
    with what is to be shown on a node."""

    at: float
    kind: str
    data: dict


class Run:
    """A queued prompt as the websocket shows it."""

    def __init__(self, listener: "Listener", prompt_id: str):
        self.listener, self.prompt_id = listener, prompt_id

    @property
    def events(self) -> list[Event]:
        return [event for event in list(self.listener.events) if event.data.get("prompt_id") == self.prompt_id]

    def of(self, kind: str, node: str | None = None) -> list[Event]:
        return [e for e in self.events if e.kind == kind and node in (None, e.data.get("node"), e.data.get("node_id"))]

    def progress(self, node: str) -> list[tuple[int, int]]:
        """(value, max) of a node's progress, in order; what is said twice in a row counts once."""
        said = [(event.data["value"], event.data["max"]) for event in self.of("progress", node)]
        return [now for before, now in zip([None, *said], said) if now != before]

    def cached(self) -> set[str]:
        """The nodes whose outputs ComfyUI had and did not compute again."""
        return {node for event in self.of("execution_cached") for node in event.data["nodes"]}

    def wait_for(self, found, timeout: float = 120):
        """The first true value of `found(run)`, asked whenever an event has come. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        with self.listener.came:
            while not (value := found(self)):
                if not self.listener.came.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"not within {timeout} s; last events: {[e.kind for e in self.events[-5:]]}")
        return value

    def wait_for_step(self, node: str, step: int, timeout: float = 120) -> None:
        """Until a node has done `step` steps. Raises AssertionError if the prompt ends before."""
        self.wait_for(lambda run: run.ending or any(value >= step for value, _ in run.progress(node)), timeout)
        assert self.ending is None, f"ended at step {self.progress(node)[-1:]}: {self.ending}"

    @property
    def ending(self) -> Event | None:
        return next((event for event in self.events if event.kind in ENDINGS), None)

    def end(self, timeout: float = 120) -> Event:
        """Waits for the last event, of whatever kind."""
        return self.wait_for(lambda run: run.ending, timeout)


class Listener:
    """A client of a ComfyServer; a context manager."""

    def __init__(self, server):
        self.server, self.client_id = server, uuid.uuid4().hex
        self.events: list[Event] = []
        self.came = threading.Condition()

    def __enter__(self):
        self._socket = websocket.create_connection(
            f"ws://127.0.0.1:{self.server.port}/ws?clientId={self.client_id}", timeout=30, http_no_proxy=["127.0.0.1"]
        )
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        self._socket.send(json.dumps(flags))
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        if self._socket.sock is not None:  # None: the server ended, and the thread with it
            with suppress(OSError):
                self._socket.sock.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join(5)
        self._socket.shutdown()

    def queue(self, graph: dict) -> Run:
        """Queues an API-format graph; raises PromptRejected."""
        return Run(self, self.server.queue(graph, client_id=self.client_id))

    def run(self, graph: dict, timeout: float = 120) -> Run:
        """Queues a graph and waits until its history says success. Raises PromptFailed."""
        run = self.queue(graph)
        run.end(timeout)
        self.server.wait(run.prompt_id, timeout)
        return run

    def _listen(self) -> None:
        while True:
            try:
                frame = self._socket.recv()
            except (websocket.WebSocketException, OSError):
                return
            if not frame:
                return
            event = _read_binary(frame) if isinstance(frame, bytes) else _read_text(frame)
            with self.came:
                self.events.append(event)
                self.came.notify_all()


def _read_text(frame: str) -> Event:
    message = json.loads(frame)
    return Event(time.monotonic(), message["type"], message["data"])


def _read_binary(frame: bytes) -> Event:
    """A preview: its type, the length of its metadata, the metadata as JSON, the encoded image. A text: its type, the
    length of its node's number, that, the text."""
    at = time.monotonic()
    kind, size = struct.unpack_from(">II", frame)
    if kind == TEXT:
        return Event(at, "text", {"node": frame[8 : 8 + size].decode(), "text": frame[8 + size :].decode()})
    assert kind == PREVIEW_WITH_METADATA, f"binary event {kind}"
    metadata = json.loads(frame[8 : 8 + size])
    image = Image.open(io.BytesIO(frame[8 + size :]))
    image.load()
    return Event(at, "preview", {**metadata, "image": image})
