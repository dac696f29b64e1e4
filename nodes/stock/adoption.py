"""Swaps the loaders of the graph that a page shows (web/adopt.js), for those that this package has and back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import folder_paths
from aiohttp import web
from server import PromptServer

from ...ascend_runtime.commands.adoption.loaders import WHOLE
from ...ascend_runtime.commands.adoption.swapping import Adoption, adopt, give_back
from ...ascend_runtime.models.family import TEXT_ENCODER, TRANSFORMER, VAE
from .. import model_files

ROUTE = "/ascend_video/adopt"
CATEGORIES = {
    TRANSFORMER: model_files.TRANSFORMER.category, TEXT_ENCODER: model_files.TEXT_ENCODER.category,
    VAE: model_files.VAE.category, WHOLE: model_files.CHECKPOINTS,
}  # fmt: skip


def serve() -> None:
    """Answers POST on ROUTE: {"workflow": a graph in UI or API format, "back": whether to swap back}.

    The answer has the swapped "workflow", what was "swapped", what was "left" with the reasons, and "notes"; or, with
    status 400, an "error".
    """
    PromptServer.instance.routes.post(ROUTE)(_answer)


async def _answer(request: web.Request) -> web.Response:
    try:
        asked = await request.json()
        if not isinstance(asked, dict):
            raise ValueError('The request is not {"workflow": ..., "back": ...}.')
        # In a thread, as it reads headers of files.
        done = await asyncio.to_thread(_swapped, asked.get("workflow"), asked.get("back") is True)
    except (ValueError, RecursionError) as error:  # json's errors are ValueErrors
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(_as_json(done), dumps=lambda value: json.dumps(value, ensure_ascii=False))


def _swapped(graph, back: bool) -> Adoption:
    return give_back(graph) if back else adopt(graph, _find)


def _find(part: str, name: str) -> Path | None:
    """The file that a core loader of this part names."""
    path = None if "\0" in name else folder_paths.get_full_path(CATEGORIES[part], name)
    return path and Path(path)


def _as_json(done: Adoption) -> dict:
    return {
        "workflow": done.graph,
        "swapped": [str(node) for node in done.swapped],
        "left": [{"node": str(node), "reason": reason} for node, reason in done.left],
        "notes": list(done.notes),
    }
