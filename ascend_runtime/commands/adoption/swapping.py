"""Swaps loaders in a graph. Node ids, links, places and widgets stay as they are: both kinds of loaders have the same
widgets in the same order, and ours have an optional input besides, after all others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ...hardware.versions import OWN_NAME, versions
from ...models.family import TRANSFORMER, Family
from .contents import Find, verdict
from .graph import GraphNode, StockNode, as_dict, as_list, dicts, entries_of, slots
from .loaders import NOT_REPLACED, WHOLE, other_loader

PARALLEL = "parallel"  # the input that only our loaders have
PACK = {"cnr_id": OWN_NAME, "ver": versions()[OWN_NAME]}  # in a node's properties: which pack a page installs for it
PACK_PROPERTIES = ("cnr_id", "aux_id", "ver")  # the properties that name a node's pack
KEPT = "ascend_core"  # the property that keeps what a swap changes besides the type
NEEDS_RANKS = {  # nodes that work with our loaders only
    "AscendApplyAcceleration": "it works with a model of the ranks only. Bypass or delete it",
}


@dataclass(frozen=True)
class Adoption:
    """A swapped graph. swapped: the nodes, as they were. left: the loaders that stay as they are, and why. notes: what
    else changed, or will not work."""

    graph: dict
    swapped: tuple[StockNode, ...]
    left: tuple[tuple[StockNode, str], ...]
    notes: tuple[str, ...] = ()


def adopt(graph: dict, find: Find = lambda part, name: None) -> Adoption:
    """The graph with loaders of ours in place of core's, where the ranks can do their work.

    find: the file that a loader names. Its content decides what it is; the name decides for files that are not found.
    Raises ValueError for what is not a graph.
    """
    graph = copy.deepcopy(graph)
    entries = list(entries_of(graph))
    verdicts = [(entry, verdict(entry, find)) for entry in entries if entry.loader]
    models = {found for entry, found in verdicts
              if entry.loader.part in (TRANSFORMER, WHOLE) and isinstance(found, Family)}  # fmt: skip
    swapped, left = [], []
    for entry, found in verdicts:
        if entry.type == entry.loader.ours:
            continue
        if isinstance(found, Family) and found not in models:
            found = f"no diffusion model of {found.title} in this graph runs on the ranks, so it stays with its model"
        if isinstance(found, Family):
            swapped.append(entry.shown)
            _swap(entry)
        else:
            left.append((entry.shown, found))
    left += [(entry.shown, other_loader(entry.type) or NOT_REPLACED)
             for entry in entries if not entry.loader and entry.loads()]  # fmt: skip
    return Adoption(graph, tuple(swapped), tuple(left))


def give_back(graph: dict) -> Adoption:
    """The graph with core's loaders in place of ours. Raises ValueError for what is not a graph."""
    graph = copy.deepcopy(graph)
    swapped, notes = [], []
    for entry in reversed(list(entries_of(graph))):  # the last change first
        if entry.type in NEEDS_RANKS:
            notes.append(f"{entry.shown}: {NEEDS_RANKS[entry.type]}.")
        if entry.loader and entry.type == entry.loader.ours:
            swapped.append(entry.shown)
            if _swap_back(entry):
                notes.append(f"{entry.shown}: its input {PARALLEL} was connected, which core's loader does not have.")
    return Adoption(graph, tuple(reversed(swapped)), (), tuple(reversed(notes)))


def _swap(entry: GraphNode) -> None:
    node = entry.node
    node[entry.type_key] = entry.loader.ours
    kept = {}
    properties = node.get("properties")
    if isinstance(properties, dict):
        kept |= {name: properties[name] for name in PACK_PROPERTIES if name in properties}
        for name in kept:
            properties[name] = PACK.get(name, "")
        properties[KEPT] = kept
    if entry.group is not None:
        kept["made"] = _hide(entry)


def _swap_back(entry: GraphNode) -> bool:
    """Returns whether the input that core's loader does not have was connected."""
    node = entry.node
    node[entry.type_key] = entry.loader.core
    if entry.graph is None:
        return as_dict(node.get("inputs")).pop(PARALLEL, None) is not None
    properties = as_dict(node.get("properties"))
    kept = properties.pop(KEPT, None)
    if isinstance(kept, dict):
        for name in PACK_PROPERTIES:
            if name in kept:
                properties[name] = kept[name]
            else:
                properties.pop(name, None)
    elif properties.get("cnr_id") == PACK["cnr_id"]:
        properties["cnr_id"] = "comfy-core"
        properties.pop("ver", None)
    if entry.group is not None:
        _show(entry, as_dict(kept).get("made"))
    return _without_parallel(node, entry)


def _hide(entry: GraphNode) -> list[str]:
    """Hides the further input of a loader in a group node, whose own inputs would move otherwise. Returns the names of
    the dicts that this makes."""
    made, holder = [], entry.group
    for name in ("config", entry.shown.id, "input"):
        if not isinstance(holder.get(name), dict):
            made.append(name)
            holder[name] = {}
        holder = holder[name]
    holder[PARALLEL] = {"visible": False}
    return made


def _show(entry: GraphNode, made) -> None:
    config = as_dict(entry.group.get("config"))
    own = as_dict(config.get(entry.shown.id))
    as_dict(own.get("input")).pop(PARALLEL, None)
    for holder, name in ((own, "input"), (config, entry.shown.id), (entry.group, "config")):
        if holder.get(name) == {} and isinstance(made, list) and name in made:
            del holder[name]


def _without_parallel(node: dict, entry: GraphNode) -> bool:
    """Removes the input and its link. Returns whether there was one."""
    inputs, graph = node.get("inputs"), entry.graph
    place = next((i for i, slot in enumerate(as_list(inputs)) if as_dict(slot).get("name") == PARALLEL), None)
    if place is None:
        return False
    number = inputs.pop(place).get("link")  # after all others, unless an older page moved it
    links = graph.get("links")
    if entry.group is not None or not isinstance(links, list):
        return number is not None
    for link in links:
        _move_end(link, node.get("id"), place)
    if number is not None:
        graph["links"] = [link for link in links if _link_number(link) != number]
        _forget(graph, number)
    return number is not None


def _link_number(link):
    return link.get("id") if isinstance(link, dict) else link[0] if isinstance(link, list) and link else None


def _move_end(link, node: object, place: int) -> None:
    """Moves the end of a link at this node up by a slot if it is below the slot `place`, which is gone."""
    at, target = ("target_slot", "target_id") if isinstance(link, dict) else (4, 3)
    try:
        if link[target] == node and link[at] > place:
            link[at] -= 1
    except (LookupError, TypeError):
        return  # not a link as ComfyUI writes them: left as it is


def _forget(graph: dict, number) -> None:
    """Removes a link's number from where it began: a node, or the input of a subgraph."""
    starts = [(slot, "links") for node in dicts(graph.get("nodes")) for slot in slots(node, "outputs")]
    for holder, key in [*starts, *((slot, "linkIds") for slot in slots(graph, "inputs"))]:
        if isinstance(holder.get(key), list):
            holder[key] = [one for one in holder[key] if one != number]
