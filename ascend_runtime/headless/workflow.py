"""A workflow in API format: reading one, and finding the widgets that hold its prompt, negative prompt, seed, image."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from . import QueueError

SAMPLERS = ("AscendSampler", "KSampler", "KSamplerAdvanced", "SamplerCustom*")
TEXT_WIDGETS = ("text", "value")  # of a text encoder; of a core String node before it
Widget = tuple[str, str]  # node id, input name


@dataclass(frozen=True)
class Target:
    """A value to find, going upstream from the samplers: `links` are input names to follow, the first that matches."""

    name: str
    kind: type
    widgets: tuple[str, ...]
    links: tuple[str, ...]


PROMPT = Target("positive prompt", str, TEXT_WIDGETS, ("positive", "guider", "cond*", "text"))
NEGATIVE = Target("negative prompt", str, TEXT_WIDGETS, ("negative", "guider", "cond*", "text"))
SEED = Target("seed", int, ("seed", "noise_seed", "value"), ("seed", "noise_seed", "noise"))


def read(path: Path, host: str, port: int) -> dict:
    """The graph of a workflow file, {node id: {"class_type", "inputs"}}. UI format goes through comfy-cli, which asks
    the ComfyUI at host:port for the nodes' inputs. Raises QueueError."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QueueError(f"Cannot read the workflow {path}: {error.strerror}. Check the path.") from None
    except ValueError as error:
        raise QueueError(f"The workflow {path} is no JSON ({error}). Export it again from ComfyUI.") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        graph = _from_ui_format(path, host, port)
    if not graph or not isinstance(graph, dict) or not all(_is_node(node) for node in graph.values()):
        raise QueueError(f"{path} is not a ComfyUI workflow: in API format every entry has class_type and inputs. "
                         "Export it in ComfyUI by Workflow > Export (API).")
    return graph


def _is_node(node) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _from_ui_format(path: Path, host: str, port: int) -> dict:
    beside_python = str(Path(sys.executable).parent)
    comfy = shutil.which("comfy", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if not comfy:
        raise QueueError(f"{path} is in UI format, and comfy-cli, which converts it, is not installed. Export it in "
                         "ComfyUI by Workflow > Export (API), or `pip install comfy-cli`.")
    command = [comfy, "--json", "run", "--print-prompt", "--where", "local", "--workflow", str(path),
               "--host", host, "--port", str(port)]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "NO_PROXY": "*"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    try:
        envelope = json.loads(answer.stdout.strip().splitlines()[-1])
        if envelope["ok"]:
            return envelope["data"]["prompt"]
        reason = envelope["error"]["message"]
    except (IndexError, ValueError, KeyError, TypeError):
        reason = (answer.stdout + answer.stderr).strip()
    raise QueueError(f"comfy-cli could not convert {path} from UI to API format: {reason}\n"
                     "Mend that, or export the workflow in ComfyUI by Workflow > Export (API).")


def find(graph: dict, target: Target) -> list[Widget]:
    """The widgets that hold `target` for any of the samplers, once each; empty if there are none."""
    return list(dict.fromkeys(widget for name in _samplers(graph) for widget in _upstream(graph, name, target, set())))


def require(graph: dict, target: Target) -> list[Widget]:
    """As `find`. Raises QueueError that says where it looked if there is none."""
    if found := find(graph, target):
        return found
    if samplers := ", ".join(_title(graph, name) for name in _samplers(graph)):
        looked = f"from {samplers} along {', '.join(target.links)}, for a widget {' or '.join(target.widgets)}"
    else:
        looked = f"for a sampler ({', '.join(SAMPLERS)})"
    raise QueueError(f"No {target.name} found in the workflow: looked {looked}. Its nodes are "
                     f"{', '.join(sorted({node['class_type'] for node in graph.values()}))}.")


def _samplers(graph: dict) -> list[str]:
    return [name for name, node in graph.items() if any(fnmatch(node["class_type"], kind) for kind in SAMPLERS)]


def _upstream(graph: dict, name: str, target: Target, seen: set[str]) -> Iterator[Widget]:
    """Widgets at or above node `name`: its own, else those of the nodes that feed the first of `target.links`."""
    if name in seen or name not in graph:
        return
    seen.add(name)
    inputs = graph[name]["inputs"]
    own = next((key for key in target.widgets if isinstance(inputs.get(key), target.kind)), None)
    if own:
        yield name, own
        return
    links = {key: value for key, value in inputs.items() if isinstance(value, list) and len(value) == 2}
    matches = ([key for key in links if fnmatch(key, pattern)] for pattern in target.links)
    for key in next((keys for keys in matches if keys), []):
        yield from _upstream(graph, str(links[key][0]), target, seen)


def require_negative(graph: dict) -> list[Widget]:
    """The negative prompt's widgets. Raises QueueError if there is none, or if it is the positive prompt's too."""
    negative = require(graph, NEGATIVE)
    if shared := set(negative) & set(find(graph, PROMPT)):
        raise QueueError(f"The workflow has no negative prompt of its own: {_title(graph, min(shared)[0])} feeds both. "
                         "Give the sampler's negative input its own text node, or leave --negative out.")
    return negative


def require_image(graph: dict) -> list[Widget]:
    """The widget of the only LoadImage node. Raises QueueError if there is none, or more than one."""
    nodes = [name for name, node in graph.items() if node["class_type"] == "LoadImage"]
    if len(nodes) != 1:
        raise QueueError(f"--images needs one LoadImage node; the workflow has {len(nodes)}"
                         f"{': ' * bool(nodes)}{', '.join(_title(graph, name) for name in nodes)}.")
    return [(nodes[0], "image")]


def get(graph: dict, widgets: list[Widget]):
    """The value of the first of `widgets`; None if there are none."""
    return graph[widgets[0][0]]["inputs"][widgets[0][1]] if widgets else None


def edited(graph: dict, values: list[tuple[list[Widget], object]]) -> dict:
    """A copy of `graph` in which every widget has its value."""
    graph = copy.deepcopy(graph)
    for widgets, value in values:
        for name, key in widgets:
            graph[name]["inputs"][key] = value
    return graph


def digest(graph: dict) -> str:
    """What a graph computes, as a hash: titles and the order of its nodes do not count."""
    nodes = {name: [node["class_type"], node["inputs"]] for name, node in graph.items()}
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()


def _title(graph: dict, name: str) -> str:
    return f"{graph[name]['class_type']} ({name})"
