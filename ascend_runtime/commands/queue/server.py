"""A ComfyUI server, as its public API shows it: queue a graph, follow it, take it back."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import QueueError, workflow
from .answers import Accepted, Entry, Message, NodeReasons, Progress, Queue, Reason, Refused, Uploaded
from .http import UPLOAD_S, Connection
from .screen import line
from .typed import NotUnderstood, decode
from .websocket import Channel

TICK_S = 1.0  # how long to listen before asking the server how the job stands
TAKE_BACK_S = 10.0  # for each answer while a job is taken back: the user waits
LARGEST_QUEUE = 48 << 20  # bytes: the graphs of all jobs that wait
LARGEST_IMAGE = 256 << 20  # bytes
MOST_REASONS = 50

Answer = TypeVar("Answer")


class Server:
    """A ComfyUI; a context manager that keeps its websocket. Every method raises QueueError when the server cannot be
    reached, or answers what ComfyUI does not.

    warn: called with what the user should know, though work goes on.
    Attribute left: the id of a job that could not be taken back; None if there is none.
    """

    def __init__(self, connection: Connection, warn: Callable[[str], None]):
        self._connection, self._warn = connection, warn
        self.url = connection.address.url
        self.left: str | None = None
        self._client_id = uuid.uuid4().hex
        self._channel = Channel(connection, self._client_id, warn)

    def __enter__(self) -> Server:
        self._queued()  # so that what is no ComfyUI is known before anything is given to it
        self._channel.start()
        return self

    def __exit__(self, *_):
        self._channel.close()
        self._connection.close()

    def upload(self, path: Path) -> None:
        """Puts an image into the server's input folder under the name that `upload_name` says."""
        content = _read_image(path)
        name = _name(path, content)
        status, body = self._connection.request("POST", "/upload/image", seconds=UPLOAD_S,
                                                files={"image": (name, content)}, data={"overwrite": "true"})
        if status != 200:
            raise QueueError(f"ComfyUI at {self.url} refused the image {path}: {_excerpt(body)}")
        if self._understood(body, Uploaded, "POST /upload/image").name != name:
            raise self._connection.odd("POST /upload/image", "it gave the image another name")

    def run(self, graph: dict, timeout: float, on_step: Callable[[str, int, int], None],
            on_wait: Callable[[str], None]) -> Entry | None:
        """Queues a graph and waits for its end; returns its history entry, or None if it was taken from the queue.
        When this is cut short (Ctrl+C, timeout, an error), the server's job is too.

        on_step: called with a node's id, its step and its number of steps.
        on_wait: called about once a second with how the job stands.
        timeout: seconds the job may run, those in the queue not counted. Raises TimeoutError.
        Raises QueueError with every node's reasons if ComfyUI refuses the graph or an output of it.
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
        """The job's id: `job`, or the server's own where it is too old to take one."""
        body = json.dumps({"prompt": graph, "prompt_id": job, "client_id": self._client_id}).encode()
        status, answer = self._connection.request("POST", "/prompt", data=body,
                                                  headers={"Content-Type": "application/json"})
        if status != 200:
            raise QueueError(_refusal(graph, answer))
        accepted = self._understood(answer, Accepted, "POST /prompt")
        if accepted.node_errors:  # ComfyUI runs the outputs without any
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
        return self._understood(body, dict[str, Entry], f"GET /history/{job}").get(job)

    def _take_back(self, job: str) -> None:
        """Ends a job, whether it waits or runs; the jobs of others go on. Warns if it fails."""
        try:
            self._post("/queue", {"delete": [job]})
            if self._may_run(job):  # an older ComfyUI ignores the id and interrupts whatever runs
                self._post("/interrupt", {"prompt_id": job})
            self.left = None
        except QueueError:
            self._warn(f"warning: job {job} may still be in ComfyUI's queue, as it could not be taken back.")

    def _may_run(self, job: str) -> bool:
        try:
            return job in self._queued(TAKE_BACK_S)[0]
        except QueueError:
            return True

    def _post(self, path: str, body: dict) -> None:
        self._connection.request("POST", path, TAKE_BACK_S, json=body)

    def _listen(self, job: str, on_step) -> None:
        """Passes progress on, until it is time to ask how the job stands: the queue has just changed, or the last time
        is a while ago."""
        until = time.monotonic() + TICK_S
        while (left := until - time.monotonic()) > 0:
            message = self._channel.next(left)
            if message and message.type in ("status", "execution_start"):
                return
            if message and message.type == "progress" and (step := _progress(message)) and step.prompt_id == job:
                on_step(step.node or "?", int(step.value), int(step.max))

    def _queued(self, seconds: float | None = None) -> tuple[list[str], list[str]]:
        """The ids of the jobs that run, and of those that wait."""
        _, body = self._connection.request("GET", "/queue", seconds, LARGEST_QUEUE)
        queue = self._understood(body, Queue, "GET /queue")
        return [job.prompt_id for job in queue.queue_running], [job.prompt_id for job in queue.queue_pending]

    def _understood(self, body: bytes, kind: type[Answer], asked: str) -> Answer:
        try:
            return decode(body, kind)
        except NotUnderstood as error:
            raise self._connection.odd(asked, f"{line(error, 200)} in {_excerpt(body)}") from None


def upload_name(path: Path) -> str:
    """A name from an image's content, so that an image with a new content is a new job. Raises QueueError."""
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


def _progress(message: Message) -> Progress | None:
    """None for one of another shape: custom nodes send what they like, and it is for showing only."""
    try:
        return decode(message.data, Progress)
    except NotUnderstood:
        return None


def _excerpt(body: bytes) -> str:
    return f"'{line(body[:400].decode(errors='replace'), 100)}'" if body.strip() else "an empty answer"


def _refusal(graph: dict, answer: bytes) -> str:
    """ComfyUI's answer to a graph that its validation refused, a line a reason."""
    try:
        refused = decode(answer, Refused)
    except NotUnderstood:
        return (f"ComfyUI refused the workflow with status 400 and, instead of reasons, {_excerpt(answer)}. "
                "Open it in this ComfyUI and run it there: does it say more?")
    error = refused.error if isinstance(refused.error, Reason) else Reason(refused.error)
    return _reasons(graph, error, refused.node_errors)


def _reasons(graph: dict, error: Reason, nodes: dict[str, NodeReasons] | list) -> str:
    lines = [f"ComfyUI refused the workflow: {line(f'{error.message} {error.details or str()}')}"]
    for name, node in (nodes or {}).items():
        title = line(workflow.title(graph.get(name, {})) or node.class_type, 100)
        lines += [f"  node {line(name, 50)} ({title}): {line(reason.message)}: {line(reason.details or '')}"
                  for reason in node.errors]
    if len(lines) > MOST_REASONS + 1:
        lines[MOST_REASONS + 1:] = [f"  and {len(lines) - MOST_REASONS - 1} more"]
    return "\n".join([*lines, "Open it in this ComfyUI, mend the nodes named, and export it again."])
