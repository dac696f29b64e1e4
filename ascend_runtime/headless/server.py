"""A ComfyUI server, as its public API shows it: queue a graph, follow it, take it back."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import requests
import websocket

from . import QueueError

TICK_S = 1.0  # how long to listen before asking the server how the job stands


class Server:
    """The ComfyUI at host:port; a context manager that keeps its websocket. Every method raises QueueError when the
    server cannot be reached."""

    def __init__(self, host: str, port: int):
        self._host, self._port, self.address = host, port, f"{host}:{port}"
        self._client_id = uuid.uuid4().hex
        self._http = requests.Session()
        self._http.trust_env = False  # the address is meant literally: no proxy between
        self._socket = None

    def __enter__(self) -> Server:
        self._connect()
        return self

    def __exit__(self, *_):
        self._socket.close()
        self._http.close()

    def upload(self, path: Path, name: str) -> None:
        """Puts an image into the server's input folder under `name`."""
        with path.open("rb") as file:
            answer = self._request("POST", "/upload/image", files={"image": (name, file)}, data={"overwrite": "true"})
        if not answer.ok:
            raise QueueError(f"ComfyUI at {self.address} refused the image {path}: status {answer.status_code}.")

    def run(self, graph: dict, timeout: float, on_step: Callable[[str, int, int], None]) -> dict | None:
        """Queues a graph and waits for its end; returns its history entry, or None if it was taken from the queue.
        When this is cut short (Ctrl+C, timeout, an error), the server's job is too.

        on_step: called with a node's id, its step and its number of steps.
        timeout: seconds the job may run, those in the queue not counted. Raises TimeoutError.
        Raises QueueError with every node's reasons if ComfyUI refuses the graph or an output of it.
        """
        job = str(uuid.uuid4())
        try:
            job = self._queue(graph, job)
            return self._follow(job, timeout, on_step)
        except (TimeoutError, KeyboardInterrupt, QueueError):
            self._take_back(job)
            raise

    def _queue(self, graph: dict, job: str) -> str:
        """The job's id: `job`, or the server's own where it is too old to take one."""
        body = {"prompt": graph, "prompt_id": job, "client_id": self._client_id}
        answer = self._request("POST", "/prompt", json=body).json()
        if "error" in answer or answer.get("node_errors"):  # with errors alone, ComfyUI runs the outputs without any
            raise QueueError(_refusal(graph, answer))
        return answer["prompt_id"]

    def _follow(self, job: str, timeout: float, on_step) -> dict | None:
        deadline = None
        while True:
            if self._listen(job, on_step):
                running, pending = self._queued()
                if job not in running | pending:
                    return self._request("GET", f"/history/{job}").json().get(job)
                if job in running:
                    deadline = deadline or time.monotonic() + timeout
            if deadline and time.monotonic() > deadline:
                raise TimeoutError

    def _take_back(self, job: str) -> None:
        """Ends a job, whether it waits or runs; the jobs of others go on."""
        self._request("POST", "/queue", json={"delete": [job]})
        if job in self._queued()[0]:  # an older ComfyUI ignores the id and interrupts whatever runs
            self._request("POST", "/interrupt", json={"prompt_id": job})

    def _listen(self, job: str, on_step) -> bool:
        """One message from the websocket. True if it is time to ask how the job stands: its queue has just changed, or
        the server was silent for a while."""
        try:
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return True
        except (websocket.WebSocketException, OSError):
            self._connect()
            return True
        if not isinstance(message, str) or not message:  # a preview image, or an empty closing message
            return False
        message = json.loads(message)
        data = message.get("data") or {}
        if message["type"] == "progress" and data.get("prompt_id") == job:
            on_step(data.get("node"), data["value"], data["max"])
        return message["type"] in ("status", "execution_start")

    def _queued(self) -> tuple[set[str], set[str]]:
        """The ids of the jobs that run, and of those that wait."""
        queue = self._request("GET", "/queue").json()
        return tuple({item[1] for item in queue[key]} for key in ("queue_running", "queue_pending"))

    def _connect(self) -> None:
        try:
            # connected here, as websocket-client would go through a proxy of the environment even to 127.0.0.1
            connection = socket.create_connection((self._host, self._port), timeout=10)
            self._socket = websocket.create_connection(f"ws://{self.address}/ws?clientId={self._client_id}",
                                                       socket=connection)
            self._socket.settimeout(TICK_S)
        except (websocket.WebSocketException, OSError) as error:
            raise self._unreachable(error) from None

    def _request(self, method: str, path: str, **arguments) -> requests.Response:
        """The server's answer, good or 400: what is wrong with that request is for the caller to say."""
        try:
            answer = self._http.request(method, f"http://{self.address}{path}", timeout=60, **arguments)
            if answer.status_code != 400:
                answer.raise_for_status()
            return answer
        except requests.RequestException as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> QueueError:
        return QueueError(f"No ComfyUI answers at {self.address} ({type(error).__name__}: {error}). "
                          "Start it, or give its address by --host and --port.")


def _refusal(graph: dict, body: dict) -> str:
    """ComfyUI's answer to a graph that its validation refused, a line a reason."""
    error = body.get("error", {"message": "Some of its outputs failed validation"})
    lines = [f"ComfyUI refused the workflow: {error['message']} {error.get('details', '')}".rstrip()]
    for name, node in (body.get("node_errors") or {}).items():
        title = graph.get(name, {}).get("_meta", {}).get("title", node["class_type"])
        lines += [f"  node {name} ({title}): {error['message']}: {error['details']}" for error in node["errors"]]
    return "\n".join([*lines, "Open it in this ComfyUI, mend the nodes named, and export it again."])
