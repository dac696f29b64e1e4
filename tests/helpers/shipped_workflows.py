"""The workflows that come with the pack: their short names, the prompts that ComfyUI's API takes, and the graphs of
its page."""

import json

from ascend_runtime.commands import templates

WORKFLOWS = templates.WORKFLOWS
NAMES = sorted(templates.SHORT)


def api(name) -> dict:
    return json.loads(templates.api_file(name).read_text())


def ui(name) -> dict:
    return json.loads(templates.shown_file(name).read_text())
