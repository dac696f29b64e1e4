"""Types of ComfyUI's answers. `typed.decode_json` rejects other data, and ignores further fields."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Union

from msgspec import Meta, Raw, Struct

from .typed import NotUnderstood, decode_json

JobId = Annotated[str, Meta(pattern=r"^[\w-]{1,100}$")]  # used in request paths
StepNumber = Annotated[float, Meta(ge=0, le=1e15)]
Number = Union[Annotated[float, Meta(ge=-1e15, le=1e15)], None]  # bounded, as Python's JSON allows infinity


class Waiting(Struct, array_like=True, gc=False):
    """A job in the queue: its number, its id, and other elements."""

    number: Number
    prompt_id: JobId


class Queue(Struct):
    """The answer to GET /queue."""

    queue_running: list[Waiting]
    queue_pending: list[Waiting]


class Reason(Struct):
    """Why a graph or a node is rejected."""

    message: str
    details: Union[str, None] = ""


class NodeReasons(Struct):
    """Why a node is rejected."""

    errors: list[Reason]
    class_type: str = "?"


class Accepted(Struct):
    """The answer to POST /prompt with status 200. If there are node_errors, ComfyUI runs only outputs without errors.
    """

    prompt_id: JobId
    node_errors: Union[dict[str, NodeReasons], list[Raw]] = {}  # an empty list in some versions


class Refused(Struct):
    """The answer to POST /prompt with status 400."""

    error: Union[Reason, str]
    node_errors: Union[dict[str, NodeReasons], list[Raw]] = {}


class Uploaded(Struct):
    """The answer to POST /upload/image."""

    name: str


class EventData(Struct):
    """timestamp: in milliseconds. The other fields belong to execution_error."""

    timestamp: Number = None
    node_id: Union[str, int, None] = None
    node_type: Union[str, None] = None
    exception_message: Union[str, None] = None


class Event(Struct, array_like=True):
    """An event of a job, such as execution_start or execution_error."""

    kind: str
    data: EventData


class Status(Struct):
    """How a job ended."""

    status_str: Literal["success", "error"]
    messages: list[Event] = []


class Shown(Struct):
    """An output of a node; for a saved file, its location. Nodes may also output other types in these lists."""

    filename: object = None
    subfolder: object = None
    type: object = None

    def path(self) -> Union[str, None]:
        """The file's path relative to ComfyUI's output folder; None if it is not a file in there."""
        if not isinstance(self.filename, str) or not isinstance(self.subfolder, (str, type(None))):
            return None
        path = PurePosixPath(self.subfolder or "", self.filename)
        return None if path.is_absolute() or ".." in path.parts or not path.name else str(path)


Anything = list[Union[Shown, list, str, int, float, bool, None]]


class Entry(Struct):
    """A job's entry of GET /history/ID: the outputs of each node, and the job's status."""

    status: Status
    outputs: dict[str, Union[dict[str, Raw], None]] = {}

    def files(self) -> tuple[list[str], int]:
        """The job's saved files, relative to ComfyUI's output folder, and the number of outputs outside of it."""
        shown = (one for node in self.outputs.values() for raw in (node or {}).values() for one in _shown(raw))
        paths = [one.path() for one in shown if one.type == "output"]
        return [path for path in paths if path], paths.count(None)


def _shown(raw: Raw) -> list[Shown]:
    try:
        return [one for one in decode_json(raw, Anything) if isinstance(one, Shown)]
    except NotUnderstood:  # not a list
        return []


class WebsocketMessage(Struct):
    """A message of the websocket. Custom nodes may send other types."""

    type: str
    data: Raw = Raw(b"null")


class NodeProgress(Struct):
    """The data of a message of type progress."""

    value: StepNumber
    max: StepNumber
    node: Union[str, None] = None
    prompt_id: Union[str, None] = None

