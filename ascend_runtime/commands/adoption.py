"""Swaps the loaders of a stock ComfyUI graph for those whose work the ranks do, and back.

A graph is what JSON gives: in UI format (nodes and links, with subgraphs and group nodes), or in API format (inputs by
node). Node ids, links, places and widgets stay as they are. Both kinds of loaders have the same widgets in the same
order; ours have an optional input besides, after all others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE, Family
from ..models.registry import families

OURS = "Ascend"  # a loader of ours is named as core's is, with this in front
PARALLEL = "parallel"  # the input that only our loaders have
PACK = {"cnr_id": "ascend-video", "ver": "0.1.0"}  # in a node's properties: which pack a page installs for it
PACK_PROPERTIES = ("cnr_id", "aux_id", "ver")  # the properties that name a node's pack
KEPT = "ascend_core"  # the property that keeps what a swap changes besides the type
FOLDERS = {  # of ComfyUI's models, by the part that they hold
    TRANSFORMER: ("diffusion_models", "unet"), TEXT_ENCODER: ("text_encoders", "clip"), VAE: ("vae",),
}  # fmt: skip
WEIGHTS = re.compile(r"\.(safetensors|gguf|sft|pth?|ckpt)$")
MAX_REASON = 300  # characters of a reason

Find = Callable[[str, str], "Path | None"]  # (part, file's name) -> the file; None: there is none


@dataclass(frozen=True)
class StockLoader:
    """A loader of core ComfyUI. part: what it loads. widgets: in their order; files: those that name files."""

    core: str
    part: str
    widgets: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def ours(self) -> str:
        return OURS + self.core


STOCK_LOADERS = (
    StockLoader("UNETLoader", TRANSFORMER, ("unet_name", "weight_dtype"), ("unet_name",)),
    StockLoader("CLIPLoader", TEXT_ENCODER, ("clip_name", "type", "device"), ("clip_name",)),
    StockLoader("DualCLIPLoader", TEXT_ENCODER, ("clip_name1", "clip_name2", "type", "device"),
                ("clip_name1", "clip_name2")),  # fmt: skip
    StockLoader("VAELoader", VAE, ("vae_name",), ("vae_name",)),
)
BY_TYPE = {name: loader for loader in STOCK_LOADERS for name in (loader.core, loader.ours)}

SEPARATE = (
    "Load the model, the text encoder and the VAE from separate files, by Load Diffusion Model, Load CLIP and Load VAE"
)
OWN_TYPES = "nodes have types of their own, which core's samplers do not take. Open a stock graph of it instead"
OTHER_LOADERS = (  # patterns of the types of loaders that are left, and why
    (r".*GGUF.*", "GGUF files are not read. Take the model's fp8_scaled, fp16 or bf16 file in core's own loader"),
    (r"(Image\w+|unCLIP)?CheckpointLoader.*", f"a checkpoint holds several networks in one file. {SEPARATE}"),
    (r"DiffusersLoader", f"it loads a whole folder. {SEPARATE}, or use Ascend Load Diffusion Model"),
    (r"(Triple|Quadruple)CLIPLoader.*", "its text encoders belong to models that the ranks do not run"),
    (r"(Load)?WanVideo.*Loader.*|LoadWanVideo.*", f"WanVideoWrapper's {OWN_TYPES}"),
    (r"(HyVideo|DownloadAndLoadHyVideo).*Load.*", f"HunyuanVideoWrapper's {OWN_TYPES}"),
    (r"Nunchaku.*Loader.*", "the ranks do not read its files. Take the model's fp8_scaled, fp16 or bf16 file"),
)
HOLDER = r"workflow[>/]|[0-9a-f]{8}-[0-9a-f-]{27}$"  # a type: the group node of a name, the subgraph of an id
LOADED = ("MODEL", "CLIP", "VAE")  # core's types that loaders put out
NOT_REPLACED = (
    "the ranks do not replace this node. If it only reads a file, use core's Load Diffusion Model, Load CLIP or Load "
    "VAE"
)
NEEDS_RANKS = {  # nodes that work with our loaders only
    "AscendApplyAcceleration": "it works with a model of the ranks only. Bypass or delete it",
}


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
        return f"{self.id} {self.type}{where}" + (f" ({', '.join(self.names)})" if self.names else "")


@dataclass(frozen=True)
class Adoption:
    """A swapped graph. swapped: the nodes, as they were. left: the loaders that stay as they are, and why. notes: what
    else changed, or will not work."""

    graph: dict
    swapped: tuple[StockNode, ...]
    left: tuple[tuple[StockNode, str], ...]
    notes: tuple[str, ...] = ()


class _Entry:
    """A node in a graph. graph: which has its links, None in API format. group: of a group node, else None."""

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
        made = {slot.get("type") for slot in _slots(self.node, "outputs")}
        taken = {slot.get("type") for slot in _slots(self.node, "inputs")}
        return self.graph is not None and bool(made & set(LOADED)) and not taken & set(LOADED) and bool(self._files())


def adopt(graph: dict, find: Find = lambda part, name: None) -> Adoption:
    """The graph with loaders of ours in place of core's, where the ranks can do their work.

    find: the file that a loader names. Its content decides what it is; the name decides for files that are not found.
    Raises ValueError for what is not a graph.
    """
    graph = copy.deepcopy(graph)
    entries = list(_entries(graph))
    verdicts = [(entry, _verdict(entry, find)) for entry in entries if entry.loader]
    models = {found for entry, found in verdicts if entry.loader.part == TRANSFORMER and isinstance(found, Family)}
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
    for entry in reversed(list(_entries(graph))):  # the last change first
        if entry.type in NEEDS_RANKS:
            notes.append(f"{entry.shown}: {NEEDS_RANKS[entry.type]}.")
        if entry.loader and entry.type == entry.loader.ours:
            swapped.append(entry.shown)
            if _swap_back(entry):
                notes.append(f"{entry.shown}: its input {PARALLEL} was connected, which core's loader does not have.")
    return Adoption(graph, tuple(reversed(swapped)), (), tuple(reversed(notes)))


def other_loader(node_type: str) -> str:
    """Why a loader of this type is left; empty if the type is unknown."""
    return next((why for pattern, why in OTHER_LOADERS if re.fullmatch(pattern, node_type)), "")


# What a loader loads


def _verdict(entry: _Entry, find: Find) -> Family | str:
    """The family whose ranks can do a loader's work, or why none can."""
    try:
        return _family_of(entry, find)
    except ValueError as error:
        return _short(error)


def _family_of(entry: _Entry, find: Find) -> Family:
    loader = entry.loader
    if len(entry.shown.names) < len(loader.files):
        raise ValueError("its file comes from another node, so it is not known which model it is")
    wanted = _family_of_type(entry.widget(loader, "type")) if loader.part == TEXT_ENCODER else None
    for name in entry.shown.names:
        path = find(loader.part, name)
        if path is not None:
            own = _family_of_file(loader.part, path, name, wanted)
        else:
            own = wanted or _family_of_name(loader.part, name)
        wanted = wanted or own
    return wanted


def _family_of_type(value: str | None) -> Family:
    """The family whose text encoders core's loaders load with this `type`."""
    known = {one.core_text.type: one for one in families().values() if one.core_text is not None}
    if value not in known:
        raise ValueError(f"its type is {value}; the ranks run {' and '.join(sorted(known))}")
    return known[value]


def _family_of_file(part: str, path: Path, name: str, wanted: Family | None) -> Family:
    from ..recognition.kinds import is_kind, kinds  # imports torch, which takes seconds
    from ..recognition.layout import find_transformer, find_vae

    try:
        if part == TRANSFORMER:
            return find_transformer(str(path)).family
        if part == VAE:
            return find_vae(str(path)).family
        fitting = [kind for kind in kinds() if kind.name in wanted.text_parts and kind.family == wanted.name]
        if any(is_kind(kind, path) for kind in fitting):
            return wanted
        raise ValueError(f"{path} is not {' or '.join(f'a {kind.what}' for kind in fitting)}")
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


def _family_of_name(part: str, name: str) -> Family:
    """The family that a file's name speaks of."""
    short = re.split(r"[\\/]", name.lower())[-1]
    found = next((one for one in families().values() if re.search(one.stock.names.get(part, r"\A\b\B"), short)), None)
    if found is None:
        known = " or ".join(one.title for one in families().values())
        raise ValueError(f"the file was not found here, and its name does not say that it belongs to {known}")
    for what, pattern in found.stock.others.items():
        if re.search(pattern, short):
            raise ValueError(f"by its name it is {what}, which the ranks do not run")
    return found


def _short(error: ValueError) -> str:
    text = str(error)
    return (text if len(text) <= MAX_REASON else text[:MAX_REASON].rstrip() + " ...").rstrip(".")


# A graph's nodes


def _entries(graph: dict) -> Iterator[_Entry]:
    if not isinstance(graph, dict):
        raise ValueError(NOT_A_GRAPH)
    if isinstance(graph.get("nodes"), list):
        yield from _entries_of_ui(graph, "")
    elif graph and all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        yield from (_Entry(node, key) for key, node in graph.items())
    else:
        raise ValueError(NOT_A_GRAPH)


NOT_A_GRAPH = (
    "This is not a ComfyUI workflow: in UI format it has `nodes`, and in API format every entry has `class_type`. Save "
    "it in ComfyUI by Workflow > Save, or Workflow > Export (API)."
)


def _entries_of_ui(graph: dict, where: str) -> Iterator[_Entry]:
    """The nodes of a graph, of its subgraphs and of its group nodes."""
    for node in _dicts(graph.get("nodes")):
        yield _Entry(node, node.get("id"), graph, where)
    for name, group in (_dict(_dict(graph.get("extra")).get("groupNodes"))).items():
        if isinstance(group, dict):
            for node in _dicts(group.get("nodes")):
                yield _Entry(node, node.get("index", node.get("id")), group, f"group node {name}", group)
    for subgraph in _dicts(_dict(graph.get("definitions")).get("subgraphs")):
        yield from _entries_of_ui(subgraph, f"subgraph {subgraph.get('name', subgraph.get('id'))}")


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _dicts(value) -> list[dict]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _slots(node: Mapping, side: str) -> list[dict]:
    return _dicts(node.get(side))


# Swapping


def _swap(entry: _Entry) -> None:
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


def _swap_back(entry: _Entry) -> bool:
    """Returns whether the input that core's loader does not have was connected."""
    node = entry.node
    node[entry.type_key] = entry.loader.core
    if entry.graph is None:
        return _dict(node.get("inputs")).pop(PARALLEL, None) is not None
    properties = _dict(node.get("properties"))
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
        _show(entry, _dict(kept).get("made"))
    return _without_parallel(node, entry)


def _hide(entry: _Entry) -> list[str]:
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


def _show(entry: _Entry, made) -> None:
    config = _dict(entry.group.get("config"))
    own = _dict(config.get(entry.shown.id))
    _dict(own.get("input")).pop(PARALLEL, None)
    for holder, name in ((own, "input"), (config, entry.shown.id), (entry.group, "config")):
        if holder.get(name) == {} and isinstance(made, list) and name in made:
            del holder[name]


def _without_parallel(node: dict, entry: _Entry) -> bool:
    """Removes the input and its link. Returns whether there was one."""
    slots, graph = node.get("inputs"), entry.graph
    place = next((i for i, slot in enumerate(_list(slots)) if _dict(slot).get("name") == PARALLEL), None)
    if place is None:
        return False
    number = slots.pop(place).get("link")  # after all others, unless an older page moved it
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
    starts = [(slot, "links") for node in _dicts(graph.get("nodes")) for slot in _slots(node, "outputs")]
    for holder, key in [*starts, *((slot, "linkIds") for slot in _slots(graph, "inputs"))]:
        if isinstance(holder.get(key), list):
            holder[key] = [one for one in holder[key] if one != number]
