"""The registry of model families.

The variable ASCEND_VIDEO_FAMILIES adds families: names of modules, separated by commas, each with a `FAMILY`. It is
read when the families are first needed, in ComfyUI and in every rank, which inherits it. The modules must be importable
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

BUILT_IN = ("wan", "hunyuan_video")  # folders of families
FAMILIES_VARIABLE = "ASCEND_VIDEO_FAMILIES"


@cache
def families() -> dict[str, Family]:
    """All families by name, in the order in which they are tried on files. Raises ValueError for a module without one,
    and for two families, or two schedules, of one name."""
    found = {name: import_module(f".{name}.family", __package__).FAMILY for name in BUILT_IN}
    for module in filter(None, map(str.strip, os.environ.get(FAMILIES_VARIABLE, "").split(","))):
        one = family_in(module, FAMILIES_VARIABLE)
        schedules = {OWN_SCHEDULE, SIMPLE, *(other.schedule for other in found.values())}
        if one.name in found or one.schedule in schedules:
            raise ValueError(
                f"{FAMILIES_VARIABLE} names {module!r}, a family {one.name!r} with the schedule {one.schedule!r}; "
                f"{', '.join(found)} are taken as families, {', '.join(sorted(schedules))} as schedules. Name it "
                "otherwise, or list it once."
            )
        found[one.name] = one
    return found


def family(name: str) -> Family:
    """The family of this name. Raises ValueError if there is none."""
    if name not in families():
        raise ValueError(f"There is no model family {name!r}; the families are {', '.join(families())}.")
    return families()[name]


def schedules() -> tuple[str, ...]:
    """The names of the families' own schedules in workflows; each of them means the schedule of the loaded model."""
    return tuple(one.schedule for one in families().values())


def require_schedule(name: str) -> None:
    """Raises ValueError if there is no schedule of this name."""
    known = (OWN_SCHEDULE, SIMPLE, *schedules())
    if name not in known:
        raise ValueError(f"schedule is {name!r}; it can be one of {', '.join(known)}.")


def mask_channels() -> frozenset[int]:
    """The numbers of channels of masks of known frames that some family reads."""
    return frozenset().union(*(one.mask_channels for one in families().values()))


def vae_for(channels: int) -> str:
    """The name of a VAE whose latents have this number of channels; empty if none is known."""
    return next(filter(None, (one.vae_for(channels) for one in families().values())), "")
