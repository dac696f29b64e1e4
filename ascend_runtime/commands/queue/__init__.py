"""Runs a workflow for many prompts on any ComfyUI by its API, without a browser. Does not import torch."""


class QueueError(ValueError):
    """The command cannot continue. The message says what was given, what is possible, and what to do."""
