"""Ascend Video: a ComfyUI node pack whose nodes run video models on a group of ranks behind ComfyUI.

ComfyUI calls `comfy_entrypoint`; nothing of ComfyUI is imported before that, so the folder imports anywhere.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes, for ComfyUI."""
    from .nodes import AscendVideo

    return AscendVideo()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
