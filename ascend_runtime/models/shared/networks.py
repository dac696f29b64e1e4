"""Builds networks of diffusers' and transformers' classes from configs that files give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def accepted(config: Mapping[str, Any], network: type) -> dict[str, Any]:
    """The config fields that are parameters of a network class: diffusers would print the others unescaped."""
    return {key: value for key, value in config.items() if key in inspect.signature(network.__init__).parameters}
