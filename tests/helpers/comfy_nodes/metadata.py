"""A route that tests ask for: POST /tests/metadata {"disabled": bool}, as if ComfyUI had been started with
--disable-metadata, or without."""

from aiohttp import web
from comfy.cli_args import args
from server import PromptServer


@PromptServer.instance.routes.post("/tests/metadata")
async def choose(request):
    args.disable_metadata = (await request.json())["disabled"]
    return web.json_response({})
