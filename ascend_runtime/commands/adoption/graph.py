"""The nodes of a ComfyUI graph, as far as swapping needs them.

A graph is what JSON gives: in UI format (nodes and links, with subgraphs and group nodes), or in API format (inputs by
node).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .loaders import BY_TYPE, StockLoader, other_loader

WEIGHTS = re.compile(r"\.(safetensors|gguf|sft|pth?|ckpt)$")
HOLDER = r"workflow[>/]|[0-9a-f]{8}-[0-9a-f-]{27}$"  # a type: the group node of a name, the subgraph of an id
LOADED = ("MODEL", "CLIP", "VAE")  # core's types that loaders put out
NOT_A_GRAPH = (
    "This is not a ComfyUI workflow: in UI format it has `nodes`, and in API format every entry has `class_type`. Save "
    "it in ComfyUI by Workflow > Save, or Workflow > Export (API)."
)


@dataclass(frozen=True)
class StockNode:
    """A node of a graph, as the report names it. where: the subgraph or group node that it is in; empty: none. names:
    the files that it loads."""

    id: str
    type: str
    where: str = ""
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" in {self.where}" if self.where else ""
        return f"{self.type} #{self.id}{where}" + (f" ({', '.join(self.names)})" if self.names else "")


class GraphNode:
    """A node that a swap may change. graph: the one with its links; None in API format. group: the definition of the
    group node that it is in, if it is in one."""

    def __init__(self, node: dict, key: object, graph: dict | None = None, where: str = "", group: dict | None = None):
        self.node, self.graph, self.group = node, graph, group
        self.type_key = "class_type" if graph is None else "type"
        loader = BY_TYPE.get(self.type)
        names = tuple(self.widget(loader, name) or "" for name in loader.files) if loader else self._files()
        self.shown = StockNode(str(key), self.type, where, tuple(filter(None, names)))
        self.loader = loader

    @property
    def type(self) -> str:
        found = self.node.get(self.type_key)
        return found if isinstance(found, str) else ""

    def widget(self, loader: StockLoader, name: str) -> str | None:
        """The text in a widget; None if there is none, as where the value comes from another node."""
        if self.graph is None:
            values = self.node.get("inputs")
        else:
            values = self.node.get("widgets_values")
            if isinstance(values, list):
                values = dict(zip(loader.widgets, values))
        value = values.get(name) if isinstance(values, dict) else None
        return value if isinstance(value, str) else None

    def _files(self) -> tuple[str, ...]:
        values = self.node.get("inputs" if self.graph is None else "widgets_values")
        values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
        return tuple(one for one in values if isinstance(one, str) and WEIGHTS.search(one))

    def loads(self) -> bool:
        """Whether it is a loader of another kind: by its type, or as it makes a MODEL, CLIP or VAE from none."""
        if other_loader(self.type):
            return True
        if re.match(HOLDER, self.type):
            return False
        made, taken = (
            [slot.get("type") for slot in slots(self.node, side)] for side in ("outputs", "inputs")
        )  # a text, or a list of options in graphs of older pages
        makes, takes = (any(kind in types for kind in LOADED) for types in (made, taken))
        return self.graph is not None and makes and not takes and bool(self._files())


def entries_of(graph: dict) -> Iterator[GraphNode]:
    """The nodes of a graph in either format. Raises ValueError for what is not a graph."""
    if not isinstance(graph, dict):
        raise ValueError(NOT_A_GRAPH)
    if isinstance(graph.get("nodes"), list):
        yield from _entries_of_ui(graph, "")
    elif graph and all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        yield from (GraphNode(node, key) for key, node in graph.items())
    else:
        raise ValueError(NOT_A_GRAPH)


def _entries_of_ui(graph: dict, where: str) -> Iterator[GraphNode]:
    """The nodes of a graph, of its subgraphs and of its group nodes."""
    for node in dicts(graph.get("nodes")):
        yield GraphNode(node, node.get("id"), graph, where)
    for name, group in (as_dict(as_dict(graph.get("extra")).get("groupNodes"))).items():
        if isinstance(group, dict):
            for node in dicts(group.get("nodes")):
                yield GraphNode(node, node.get("index", node.get("id")), group, f"group node {name}", group)
    for subgraph in dicts(as_dict(graph.get("definitions")).get("subgraphs")):
        yield from _entries_of_ui(subgraph, f"subgraph {subgraph.get('name', subgraph.get('id'))}")


def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def as_list(value) -> list:
    return value if isinstance(value, list) else []


def dicts(value) -> list[dict]:
    return [one for one in as_list(value) if isinstance(one, dict)]


def slots(node: Mapping, side: str) -> list[dict]:
    return dicts(node.get(side))
