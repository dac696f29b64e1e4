"""What a ComfyUI answers, as types: `typed.decode` refuses what does not fit, and skips other fields."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Union

from msgspec import Meta, Raw, Struct

from .typed import NotUnderstood, decode

JobId = Annotated[str, Meta(pattern=r"^[\w-]{1,100}$")]  # goes into paths of requests
Step = Annotated[float, Meta(ge=0, le=1e15)]
Number = Union[Annotated[float, Meta(ge=-1e15, le=1e15)], None]  # Python's JSON has infinities


class Waiting(Struct, array_like=True, gc=False):
    """A job in the queue: its number, its id, and more."""

    number: Number
    prompt_id: JobId


class Queue(Struct):
    """Of GET /queue."""

    queue_running: list[Waiting]
    queue_pending: list[Waiting]


class Reason(Struct):
    """Why a graph, or a node of it, is refused."""

    message: str
    details: Union[str, None] = ""


class NodeReasons(Struct):
    """Why a node is refused."""

    errors: list[Reason]
    class_type: str = "?"


class Accepted(Struct):
    """Of POST /prompt, status 200; with node_errors, outputs without errors run."""

    prompt_id: JobId
    node_errors: Union[dict[str, NodeReasons], list[Raw]] = {}  # a list, always empty, in some versions


class Refused(Struct):
    """Of POST /prompt, status 400."""

    error: Union[Reason, str]
    node_errors: Union[dict[str, NodeReasons], list[Raw]] = {}


class Uploaded(Struct):
    """Of POST /upload/image."""

    name: str


class EventData(Struct):
    """timestamp: in milliseconds. The rest is of execution_error."""

    timestamp: Number = None
    node_id: Union[str, int, None] = None
    node_type: Union[str, None] = None
    exception_message: Union[str, None] = None


class Event(Struct, array_like=True):
    """What happened to a job, as execution_start or execution_error."""

    kind: str
    data: EventData


class Status(Struct):
    """How a job ended."""

    status_str: Literal["success", "error"]
    messages: list[Event] = []


class Shown(Struct):
    """One of what a node showed. Of a file that it saved: where it is. Nodes may show anything else in such lists."""

    filename: object = None
    subfolder: object = None
    type: object = None

    def path(self) -> Union[str, None]:
        """Relative to ComfyUI's output folder; None if this names no file in there."""
        if not isinstance(self.filename, str) or not isinstance(self.subfolder, (str, type(None))):
            return None
        path = PurePosixPath(self.subfolder or "", self.filename)
        return None if path.is_absolute() or ".." in path.parts or not path.name else str(path)


Anything = list[Union[Shown, list, str, int, float, bool, None]]


class Entry(Struct):
    """A job's entry of GET /history/ID: what each node showed, and how the job ended."""

    status: Status
    outputs: dict[str, Union[dict[str, Raw], None]] = {}

    def files(self) -> tuple[list[str], int]:
        """Files that the job saved, relative to ComfyUI's output folder, and how many outputs name none in there."""
        shown = (one for node in self.outputs.values() for raw in (node or {}).values() for one in _shown(raw))
        paths = [one.path() for one in shown if one.type == "output"]
        return [path for path in paths if path], paths.count(None)


def _shown(raw: Raw) -> list[Shown]:
    try:
        return [one for one in decode(raw, Anything) if isinstance(one, Shown)]
    except NotUnderstood:  # no list
        return []


class Message(Struct):
    """Of the websocket; custom nodes send kinds of their own."""

    type: str
    data: Raw = Raw(b"null")


class Progress(Struct):
    """Of a message of the type progress."""

    value: Step
    max: Step
    node: Union[str, None] = None
    prompt_id: Union[str, None] = None

