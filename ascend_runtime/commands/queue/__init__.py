"""Videos without a browser: one workflow, many prompts, queued on any ComfyUI by its API. Free of torch."""


class QueueError(ValueError):
    """The command cannot go on; the message says what was given, what is possible, what to do."""
