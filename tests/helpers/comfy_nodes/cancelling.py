"""Cancels at a wanted moment, as this ComfyUI or as a newer one does: two routes that tests ask for.

POST /tests/interrupts {"newer": bool}: newer ComfyUIs (0.33.0, say) derive InterruptProcessingException from
BaseException, which passes every `except Exception`.
POST /tests/cancel {"node": id, "loading": bool}: someone presses Cancel just before the next progress of that node is
shown, of reading its files or of its work. ComfyUI then raises the exception inside whatever reports that progress.
"""

import comfy.model_management
import comfy.utils
from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

OWN = comfy.model_management.InterruptProcessingException
LOADING = 100  # what the pack's progress of reading goes up to


class NewerInterrupt(BaseException):
    pass


@PromptServer.instance.routes.post("/tests/interrupts")
async def choose_interrupts(request):
    newer = (await request.json())["newer"]
    comfy.model_management.InterruptProcessingException = NewerInterrupt if newer else OWN
    return web.json_response({})


@PromptServer.instance.routes.post("/tests/cancel")
async def cancel_later(request):
    wanted = await request.json()
    show = comfy.utils.PROGRESS_BAR_HOOK

    def hook(value, total, *arguments, **others):
        if get_executing_context().node_id == wanted["node"] and (total == LOADING) == wanted["loading"]:
            comfy.utils.set_progress_bar_global_hook(show)
            comfy.model_management.interrupt_current_processing()
        show(value, total, *arguments, **others)

    comfy.utils.set_progress_bar_global_hook(hook)
    return web.json_response({})
