"""A ComfyUI server by its public API: queues a graph, follows it, and removes it."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import QueueError, workflow
from .answers import Accepted, Entry, NodeProgress, NodeReasons, Queue, Reason, Refused, Uploaded, WebsocketMessage
from .http import UPLOAD_S, Connection
from .screen import one_line
from .typed import NotUnderstood, decode_json
from .websocket import WebsocketListener

TICK_S = 1.0  # interval between requests for the job's state
TAKE_BACK_S = 10.0  # for each answer while a job is removed, as the user waits
LARGEST_QUEUE = 48 << 20  # bytes; it contains the graphs of all waiting jobs
LARGEST_IMAGE = 256 << 20  # bytes
MOST_REASONS = 50

Answer = TypeVar("Answer")


class Server:
    """A ComfyUI server; a context manager that holds its websocket. Every method raises QueueError if the server cannot
    be reached, or its answer is not ComfyUI's.

    warn: called with warnings for the user.
    Attribute left: the id of a job that could not be removed, or None.
    """

    def __init__(self, connection: Connection, warn: Callable[[str], None]):
        self._connection, self._warn = connection, warn
        self.url = connection.address.url
        self.left: str | None = None
        self._client_id = uuid.uuid4().hex
        self._channel = WebsocketListener(connection, self._client_id, warn)

    def __enter__(self) -> Server:
        self._queued()  # raises if it is not a ComfyUI
        self._channel.start()
        return self

    def __exit__(self, *_):
        self._channel.close()
        self._connection.close()

    def upload(self, path: Path) -> None:
        """Uploads an image to the server's input folder under the name given by `upload_name`."""
        content = _read_image(path)
        name = _name(path, content)
        status, body = self._connection.request("POST", "/upload/image", seconds=UPLOAD_S,
                                                files={"image": (name, content)}, data={"overwrite": "true"})
        if status != 200:
            raise QueueError(f"ComfyUI at {self.url} rejects the image {path}: {_excerpt(body)}")
        if self._decoded(body, Uploaded, "POST /upload/image").name != name:
            raise self._connection.unexpected("POST /upload/image", "it has renamed the image")

    def run(self, graph: dict, timeout: float, on_step: Callable[[str, int, int], None],
            on_wait: Callable[[str], None]) -> Entry | None:
        """Queues a graph and waits for its end. Returns its history entry, or None if it was removed from the queue.
        If this is interrupted (Ctrl+C, timeout, an error), removes the job from the server.

        on_step: called with a node's id, its step and its number of steps.
        on_wait: called about once per second with the job's state.
        timeout: seconds that the job may run, not counting its time in the queue. Raises TimeoutError.
        Raises QueueError with every node's errors if ComfyUI rejects the graph or an output of it.
        """
        self.left = job = str(uuid.uuid4())
        try:
            self.left = job = self._queue(graph, job)
            entry = self._follow(job, timeout, on_step, on_wait)
        except BaseException:
            self._take_back(job)
            raise
        self.left = None
        return entry

    def _queue(self, graph: dict, job: str) -> str:
        """The job's id: `job`, or the server's own if its version does not support given ids."""
        body = json.dumps({"prompt": graph, "prompt_id": job, "client_id": self._client_id}).encode()
        status, answer = self._connection.request("POST", "/prompt", data=body,
                                                  headers={"Content-Type": "application/json"})
        if status != 200:
            raise QueueError(_refusal(graph, answer))
        accepted = self._decoded(answer, Accepted, "POST /prompt")
        if accepted.node_errors:  # ComfyUI runs only outputs without errors
            raise QueueError(_reasons(graph, Reason("Some of its outputs failed validation"), accepted.node_errors))
        return accepted.prompt_id

    def _follow(self, job: str, timeout: float, on_step, on_wait) -> Entry | None:
        began = None
        while True:
            self._listen(job, on_step)
            running, pending = self._queued()
            if job not in running and job not in pending:
                return self._history(job)
            if job not in running:
                on_wait(f"waiting; jobs in the queue: {len(running) + len(pending)}")
                continue
            began = began or time.monotonic()
            if (ran := time.monotonic() - began) > timeout:
                raise TimeoutError
            on_wait(f"running for {ran:.0f} s")

    def _history(self, job: str) -> Entry | None:
        _, body = self._connection.request("GET", f"/history/{job}")
        return self._decoded(body, dict[str, Entry], f"GET /history/{job}").get(job)

    def _take_back(self, job: str) -> None:
        """Removes a waiting or running job. Other jobs are not affected. Warns if it fails."""
        try:
            self._post("/queue", {"delete": [job]})
            if self._may_run(job):  # check, as older versions ignore the id and interrupt any running job
                self._post("/interrupt", {"prompt_id": job})
            self.left = None
        except QueueError:
            self._warn(f"warning: job {job} may still be in ComfyUI's queue, as it could not be removed.")

    def _may_run(self, job: str) -> bool:
        try:
            return job in self._queued(TAKE_BACK_S)[0]
        except QueueError:
            return True

    def _post(self, path: str, body: dict) -> None:
        self._connection.request("POST", path, TAKE_BACK_S, json=body)

    def _listen(self, job: str, on_step) -> None:
        """Relays progress until the job's state should be requested: the queue has changed, or TICK_S has passed."""
        until = time.monotonic() + TICK_S
        while (left := until - time.monotonic()) > 0:
            message = self._channel.next(left)
            if message and message.type in ("status", "execution_start"):
                return
            if message and message.type == "progress" and (step := _progress(message)) and step.prompt_id == job:
                on_step(step.node or "?", int(step.value), int(step.max))

    def _queued(self, seconds: float | None = None) -> tuple[list[str], list[str]]:
        """The ids of running jobs, and of waiting jobs."""
        _, body = self._connection.request("GET", "/queue", seconds, LARGEST_QUEUE)
        queue = self._decoded(body, Queue, "GET /queue")
        return [job.prompt_id for job in queue.queue_running], [job.prompt_id for job in queue.queue_pending]

    def _decoded(self, body: bytes, kind: type[Answer], request: str) -> Answer:
        try:
            return decode_json(body, kind)
        except NotUnderstood as error:
            raise self._connection.unexpected(request, f"{one_line(error, 200)} in {_excerpt(body)}") from None


def upload_name(path: Path) -> str:
    """A name from a hash of the image, so that a changed image is a new job. Raises QueueError."""
    return _name(path, _read_image(path))


def _name(path: Path, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:16]}{path.suffix.lower()}"


def _read_image(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_IMAGE + 1)
    except OSError as error:
        raise QueueError(f"Cannot read the image {path}: {error.strerror}. Check the path in --images.") from None
    if len(content) > LARGEST_IMAGE:
        raise QueueError(f"The image {path} has more than {LARGEST_IMAGE >> 20} MiB. Save it smaller.")
    return content


def _progress(message: WebsocketMessage) -> NodeProgress | None:
    """The progress in a message; None if it has another format, as custom nodes may send."""
    try:
        return decode_json(message.data, NodeProgress)
    except NotUnderstood:
        return None


def _excerpt(body: bytes) -> str:
    return f"'{one_line(body[:400].decode(errors='replace'), 100)}'" if body.strip() else "an empty answer"


def _refusal(graph: dict, answer: bytes) -> str:
    """The error text for a graph that ComfyUI rejects, with one line per reason."""
    try:
        refused = decode_json(answer, Refused)
    except NotUnderstood:
        return (f"ComfyUI rejects the workflow with status 400 and {_excerpt(answer)} instead of reasons. "
                "Open it in this ComfyUI and run it there to see its errors.")
    error = refused.error if isinstance(refused.error, Reason) else Reason(refused.error)
    return _reasons(graph, error, refused.node_errors)


def _reasons(graph: dict, error: Reason, nodes: dict[str, NodeReasons] | list) -> str:
    lines = [f"ComfyUI rejects the workflow: {one_line(f'{error.message} {error.details or str()}')}"]
    for name, node in (nodes or {}).items():
        title = one_line(workflow.title(graph.get(name, {})) or node.class_type, 100)
        lines += [f"  node {one_line(name, 50)} ({title}): {one_line(reason.message)}: {one_line(reason.details or '')}"
                  for reason in node.errors]
    if len(lines) > MOST_REASONS + 1:
        lines[MOST_REASONS + 1:] = [f"  and {len(lines) - MOST_REASONS - 1} more"]
    return "\n".join([*lines, "Open it in this ComfyUI, fix these nodes, and export it again."])
