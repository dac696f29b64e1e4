"""How ComfyUI's page gets the pack's workflows: in a fixed order, and also by their short names."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ...ascend_runtime.commands import templates

LIST = "/workflow_templates"
PACK = Path(__file__).absolute().parents[2].name  # the folder in custom_nodes, by which ComfyUI names the pack


def serve() -> None:
    """From now on, links such as /?template=tiny_wan_text_to_video&source=ascend-video open the workflow of that short
    name, and the template browser lists the workflows by name: the ones that need no download come first."""
    server = PromptServer.instance
    for short in templates.SHOWN:
        server.routes.get(f"{LIST}/{PACK}/{short}.json")(partial(_file, templates.shown_file(short)))
    server.app.middlewares.append(_in_order)


async def _file(path: Path, _: web.Request) -> web.FileResponse:
    return web.FileResponse(path)


@web.middleware
async def _in_order(request: web.Request, handler) -> web.StreamResponse:
    """ComfyUI lists files as they lie on the disk."""
    response = await handler(request)
    if request.path.removeprefix("/api") != LIST or not isinstance(response, web.Response):
        return response
    listed = json.loads(response.text)
    return web.json_response({pack: sorted(names) if pack == PACK else names for pack, names in listed.items()})
