"""Keeps the records of the jobs that each node ran, and finds those that a node's inputs come from.

ComfyUI keeps the outputs of nodes, so a file may be saved by a graph that runs no job. Records are kept by what a node
computes: its inputs and widgets, and those of all nodes before it, as ComfyUI's own cache does. So a record is never
that of another video, whatever ran in between, and no output of a node has to carry it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import nodes
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import is_link
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import ExecutionContext, get_executing_context

from ...ascend_runtime.specs.record import MAX_JOBS, JobRecord

MOST_NODES = 10_000  # a record takes some kB
ALL = -1  # items of a list


@dataclass
class _Run:
    """The last run of a node: in which prompt, and the jobs for each item of a list that it ran on."""

    prompt_id: str
    jobs: dict[int, list[JobRecord]] = field(default_factory=dict)

    def of(self, item: int) -> list[JobRecord]:
        """Those of an item; ComfyUI takes the last of a list that is too short."""
        chosen = self.jobs.values() if item == ALL else [self.jobs.get(item) or self.jobs[max(self.jobs)]]
        return [job for jobs in chosen for job in jobs]


_kept: OrderedDict[str, dict[str, _Run]] = OrderedDict()  # by what a node computes, then by its id


def add(record: JobRecord | None) -> None:
    """Keeps a record of the running node."""
    context = get_executing_context()
    if record is None or context is None:
        return
    key = _computed_by(context.node_id, get_progress_state().dynprompt, {})
    runs = _kept.setdefault(key, {})
    _kept.move_to_end(key)
    if context.node_id not in runs or runs[context.node_id].prompt_id != context.prompt_id:
        runs[context.node_id] = _Run(context.prompt_id)
    jobs = runs[context.node_id].jobs.setdefault(context.list_index or 0, [])
    if len(jobs) < MAX_JOBS:
        jobs.append(record)
    while len(_kept) > MOST_NODES:
        _kept.popitem(last=False)


def before(context: ExecutionContext, this_run: bool = False) -> list[JobRecord]:
    """The records of the jobs that the running node's inputs come from, in the order of the graph, and of its own.
    this_run: only those that ran in this prompt, not those whose outputs ComfyUI has kept."""
    prompt = get_progress_state().dynprompt
    keys: dict[str, str] = {}
    runs = ((_run(node, prompt, keys), item) for node, item in _upstream(context, prompt))
    chosen = [(run, item) for run, item in runs if run and (not this_run or run.prompt_id == context.prompt_id)]
    return [job for run, item in chosen for job in run.of(item)][:MAX_JOBS]


def _run(node: str, prompt: DynamicPrompt, keys: dict[str, str]) -> _Run | None:
    """That of this node, or of another one that computes the same, whose outputs ComfyUI then took."""
    runs = _kept.get(_computed_by(node, prompt, keys))
    return (runs.get(node) or list(runs.values())[-1]) if runs else None


def _computed_by(node: str, prompt: DynamicPrompt, keys: dict[str, str]) -> str:
    """A key of what a node computes. keys: of the nodes that were asked for before."""
    if node not in keys:
        if not prompt.has_node(node):
            return ""
        found = prompt.get_node(node)
        inputs = {
            name: ["link", _computed_by(value[0], prompt, keys), value[1]] if is_link(value) else value
            for name, value in sorted(found["inputs"].items())
        }
        text = json.dumps([found["class_type"], found.get("is_changed"), inputs], sort_keys=True, default=repr)
        keys[node] = hashlib.sha256(text.encode()).hexdigest()
    return keys[node]


def _upstream(context: ExecutionContext, prompt: DynamicPrompt) -> Iterator[tuple[str, int]]:
    """The nodes that the running node's inputs come from, sources first, each with the item of a list that it ran on
    for this output. A node that makes a list, or takes one as a whole, mixes items."""
    seen: dict[tuple[str, int], None] = {}

    def visit(node: str, item: int) -> None:
        if (node, item) in seen or (node, ALL) in seen or not prompt.has_node(node):
            return
        found = prompt.get_node(node)
        kind = nodes.NODE_CLASS_MAPPINGS[found["class_type"]]
        mixes = getattr(kind, "INPUT_IS_LIST", False) or any(getattr(kind, "OUTPUT_IS_LIST", None) or ())
        for value in found["inputs"].values():
            if is_link(value):
                visit(value[0], ALL if mixes else item)
        seen[node, item] = None

    visit(context.node_id, context.list_index or 0)
    yield from seen
