"""Reads a workflow in API format, and finds the widgets of its prompt, negative prompt, seed and image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from msgspec import Struct

from .. import templates
from . import QueueError
from .address import Address
from .input_files import read_text
from .screen import one_line
from .typed import NotUnderstood, decode_json

SAMPLERS = ("AscendSampler", "AscendSamplerAdvanced", "KSampler", "KSamplerAdvanced", "SamplerCustom*")
TEXT_WIDGETS = ("text", "value")  # of a text encoder, and of a core String node linked to it
Widget = tuple[str, str]  # node id, input name
MAX_WORKFLOW_BYTES = 16 << 20  # bytes of a workflow file; parsing takes up to 25 times as much memory
MAX_JSON_DEPTH = 100
CONVERSION_S = 120


@dataclass(frozen=True)
class WidgetSearch:
    """A value to find upstream of the samplers. links: input names to follow; the first that matches is used."""

    name: str
    kind: type
    widgets: tuple[str, ...]
    links: tuple[str, ...]


PROMPT = WidgetSearch("positive prompt", str, TEXT_WIDGETS, ("positive", "guider", "cond*", "text"))
NEGATIVE = WidgetSearch("negative prompt", str, TEXT_WIDGETS, ("negative", "guider", "cond*", "text"))
SEED = WidgetSearch("seed", int, ("seed", "noise_seed", "value"), ("seed", "noise_seed", "noise"))


def read(path: Path, address: Address) -> dict:
    """Reads the graph of a workflow file, {node id: {"class_type", "inputs"}}. UI format is converted by comfy-cli,
    which requests the nodes' inputs from the ComfyUI at `address`. If there is no such file, `path` may be the name of
    one of the pack's templates. Raises QueueError."""
    if not path.exists():
        path = templates.named(path) or path
    graph = read_graph(path)
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        graph = _from_ui_format(path, address)
    if not graph or not isinstance(graph, dict) or not all(_is_node(node) for node in graph.values()):
        raise QueueError(f"{path} is not a ComfyUI workflow: in API format every entry has class_type and inputs. "
                         "Export it in ComfyUI by Workflow > Export (API).")
    return graph


def read_graph(path: Path):
    """What a workflow file holds, before checks of its form. Raises QueueError if it is not plain JSON."""
    text = read_text(path, f"the workflow {path}", MAX_WORKFLOW_BYTES)
    try:
        graph = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(graph, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise QueueError(f"The workflow {path} has half a character, {ascii(error.object[error.start])}, as of a cut "
                         "emoji. Fix that text and export it again.") from None
    except RecursionError:
        graph = None
    except ValueError as error:
        raise QueueError(f"The workflow {path} is not valid JSON ({error}). Export it again from ComfyUI.") from None
    if graph is None or _is_deeper(graph, MAX_JSON_DEPTH):
        raise QueueError(f"The workflow {path} is nested more than {MAX_JSON_DEPTH} levels deep, which no workflow is. "
                         "Export it again from ComfyUI.")
    return graph


def _refuse_constant(name: str):
    raise ValueError(f"it has {name}, which is not a number")


def _is_deeper(value, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [one for children in inner for one in children]
    return bool(level)


class Fault(Struct):
    """Why comfy-cli could not convert a workflow."""

    message: str


class Conversion(Struct):
    """The converted graph, before checks."""

    prompt: dict


class Converted(Struct):
    """The last line of comfy-cli's output."""

    ok: bool = False
    data: Conversion | None = None
    error: Fault | None = None


def _is_node(node) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _from_ui_format(path: Path, address: Address) -> dict:
    if not address.plain:
        raise QueueError(f"{path} is in UI format, and comfy-cli, which converts it, supports only http://host:port, "
                         f"not {address.url}. Export it in ComfyUI by Workflow > Export (API).")
    next_to_python = str(Path(sys.executable).parent)
    comfy = shutil.which("comfy", path=os.pathsep.join([next_to_python, os.environ.get("PATH", "")]))
    if not comfy:
        raise QueueError(f"{path} is in UI format, and comfy-cli, which converts it, is not installed. Export it in "
                         "ComfyUI by Workflow > Export (API), or `pip install comfy-cli`.")
    command = [comfy, "--json", "run", "--print-prompt", "--where", "local", "--workflow", str(path),
               "--host", address.host, "--port", str(address.port)]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "NO_PROXY": "*"}
    try:
        answer = subprocess.run(command, capture_output=True, env=environment, stdin=subprocess.DEVNULL,
                                timeout=CONVERSION_S)
        converted = decode_json(answer.stdout.strip().rpartition(b"\n")[2], Converted)
        reason = converted.error.message if converted.error else "it returned neither a prompt nor an error"
    except subprocess.TimeoutExpired:
        converted, reason = Converted(), f"it took more than {CONVERSION_S} s"
    except NotUnderstood:
        converted, reason = Converted(), (answer.stdout + answer.stderr).decode(errors="replace")
    if converted.ok and converted.data:
        return converted.data.prompt
    raise QueueError(f"comfy-cli could not convert {path} from UI to API format: {one_line(reason)}\n"
                     "Fix that, or export the workflow in ComfyUI by Workflow > Export (API).")


def find(graph: dict, target: WidgetSearch) -> list[Widget]:
    """The widgets of `target` for all samplers, without duplicates; empty if there are none."""
    seen: set[str] = set()
    return [widget for name in _samplers(graph) for widget in _upstream(graph, name, target, seen)]


def require(graph: dict, target: WidgetSearch) -> list[Widget]:
    """As `find`. Raises QueueError that says where it searched if there is none."""
    if found := find(graph, target):
        return found
    if samplers := _named(graph, _samplers(graph)):
        searched = f"from {samplers} along {', '.join(target.links)}, for a widget {' or '.join(target.widgets)}"
    else:
        searched = f"for a sampler ({', '.join(SAMPLERS)})"
    raise QueueError(f"No {target.name} found in the workflow: searched {searched}. Its nodes are "
                     f"{one_line(', '.join(sorted({node['class_type'] for node in graph.values()})), 500)}.")


def _samplers(graph: dict) -> list[str]:
    return [name for name, node in graph.items() if any(fnmatch(node["class_type"], kind) for kind in SAMPLERS)]


def _upstream(graph: dict, name: str, target: WidgetSearch, seen: set[str]) -> Iterator[Widget]:
    """Widgets at or upstream of node `name`: its own, else those of the nodes linked to the first of `target.links`.
    Skips nodes in `seen`."""
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        inputs = graph[name]["inputs"]
        own = next((key for key in target.widgets if isinstance(inputs.get(key), target.kind)), None)
        if own:
            yield name, own
        else:
            waiting += reversed(_sources(inputs, target.links))


def _sources(inputs: dict, patterns: tuple[str, ...]) -> list[str]:
    """The source nodes of the links that match the first of `patterns` with any match."""
    links = {key: str(value[0]) for key, value in inputs.items() if isinstance(value, list) and len(value) == 2}
    matches = ([source for key, source in links.items() if fnmatch(key, pattern)] for pattern in patterns)
    return next((sources for sources in matches if sources), [])


def require_negative(graph: dict) -> list[Widget]:
    """The negative prompt's widgets. Raises QueueError if there is none, or if it is shared with the positive prompt.
    """
    negative = require(graph, NEGATIVE)
    if shared := set(negative) & set(find(graph, PROMPT)):
        raise QueueError("The workflow has no negative prompt of its own: "
                         f"{_named(graph, min(shared)[:1])} feeds both. "
                         "Connect another text node to the sampler's negative input, or remove --negative.")
    return negative


def require_image(graph: dict) -> list[Widget]:
    """The widget of the only LoadImage node. Raises QueueError if there is none, or more than one."""
    nodes = [name for name, node in graph.items() if node["class_type"] == "LoadImage"]
    if len(nodes) != 1:
        raise QueueError(f"--images needs one LoadImage node; the workflow has {len(nodes)}"
                         f"{': ' * bool(nodes)}{_named(graph, nodes)}.")
    return [(nodes[0], "image")]


def get(graph: dict, widgets: list[Widget]):
    """The value of the first of `widgets`; None if there are none."""
    return graph[widgets[0][0]]["inputs"][widgets[0][1]] if widgets else None


def edited(graph: dict, values: list[tuple[list[Widget], object]]) -> dict:
    """A copy of `graph` with new widget values. Unchanged nodes are shared."""
    graph = dict(graph)
    for widgets, value in values:
        for name, key in widgets:
            graph[name] = {**graph[name], "inputs": {**graph[name]["inputs"], key: value}}
    return graph


def digest(graph: dict) -> str:
    """A hash of what a graph computes, independent of titles and of the order of its nodes."""
    nodes = {name: [node["class_type"], node["inputs"]] for name, node in graph.items()}
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()


def title(node: dict) -> str | None:
    """What a node is called in ComfyUI; None if the workflow does not say."""
    meta = node.get("_meta")
    name = meta.get("title") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else None


def _named(graph: dict, names: Iterable[str]) -> str:
    """Class and id of nodes."""
    return one_line(", ".join(f"{graph[name]['class_type']} ({name})" for name in names), 500)
