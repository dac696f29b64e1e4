"""Puts records into the metadata that ComfyUI writes: those of core's nodes that save videos and pictures, and others
that write `extra_pnginfo`."""

from __future__ import annotations

from collections.abc import ItemsView

import comfyui_version
import msgspec
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...ascend_runtime.hardware.versions import versions
from ...ascend_runtime.specs.record import RECORD_FORMAT, KEY, VideoRecord
from . import kept

OURS = "Ascend"  # begins the ids of this pack's nodes


class RecordOfOutput(dict):
    """The value of the entry KEY of `extra_pnginfo`, of which all nodes of a prompt get the same one.

    A node writes it as JSON while it runs. Its items are then the record of this node's inputs: they are not known
    before, as the prompt is queued before its jobs run, and differ from node to node. Elsewhere, as in ComfyUI's
    history, it is only a mark.
    """

    def __init__(self):
        super().__init__(format=RECORD_FORMAT)  # JSON asks an empty dict for no items

    def items(self) -> ItemsView:
        context = get_executing_context()
        if context is None:
            return super().items()
        numbers = versions() | {"comfyui": comfyui_version.__version__}
        record = VideoRecord(format=RECORD_FORMAT, versions=numbers, jobs=kept.before(context))
        return msgspec.to_builtins(record).items()


def serve() -> None:
    """From now on, graphs with this pack's nodes have records in their metadata, unless ComfyUI writes none."""
    PromptServer.instance.add_on_prompt_handler(_with_record)


def _with_record(request: dict) -> dict:
    """A request to run a graph, as a page or a program has sent it."""
    if args.disable_metadata:
        return request
    graph, extra = request.get("prompt"), request.setdefault("extra_data", {})
    if isinstance(graph, dict) and isinstance(extra, dict) and any(map(_is_ours, graph.values())):
        written = extra.get("extra_pnginfo")
        extra["extra_pnginfo"] = {**(written if isinstance(written, dict) else {}), KEY: RecordOfOutput()}
    return request


def _is_ours(node: object) -> bool:
    return isinstance(node, dict) and str(node.get("class_type", "")).startswith(OURS)
