"""Prompts of one embedding that no rank knows yet: they differ behind the 512 tokens that are read."""

import os
from itertools import count

_READ = "a red ball " * 160  # long enough for a while in the encoder
_numbers = count(1000 * os.getpid())


def new_prompt() -> str:
    """Another one at each call, in any process."""
    return f"{_READ}{next(_numbers)}"
