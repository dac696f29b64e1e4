"""The families of models that there are.

The variable ASCEND_VIDEO_FAMILIES adds others: names of modules, separated by commas, each with a `FAMILY`. It is read
when the families are first needed, in ComfyUI and in every rank, which inherits it; the modules must be importable
there (PYTHONPATH).
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

from ..specs.jobs import OWN as OWN_SCHEDULE
from ..specs.jobs import SIMPLE
from .family import Family
from .further import family_in

FOLDERS = ("wan",)  # of families, here
FURTHER = "ASCEND_VIDEO_FAMILIES"


@cache
def families() -> dict[str, Family]:
    """All families by name, in the order in which files are tried. Raises ValueError for a module that has none."""
    found = [import_module(f".{name}.family", __package__).FAMILY for name in FOLDERS]
    named = filter(None, map(str.strip, os.environ.get(FURTHER, "").split(",")))
    found += [family_in(module, FURTHER) for module in named]
    return {family.name: family for family in found}


def family(name: str) -> Family:
    """The family of that name. Raises ValueError where there is none."""
    if name not in families():
        raise ValueError(f"There is no family of models {name!r}; there are {', '.join(families())}.")
    return families()[name]


def schedules() -> tuple[str, ...]:
    """The names under which workflows have stored a family's own schedule; any stands for that of the model at hand."""
    return tuple(one.schedule for one in families().values())


def require_schedule(name: str) -> None:
    """Raises ValueError where there is no schedule of this name."""
    known = (OWN_SCHEDULE, SIMPLE, *schedules())
    if name not in known:
        raise ValueError(f"schedule is {name!r}; it can be one of {', '.join(known)}.")


def vae_for(channels: int) -> str:
    """The name of a VAE whose latents have so many channels; empty where none is known."""
    return next(filter(None, (one.vae_for(channels) for one in families().values())), "")
