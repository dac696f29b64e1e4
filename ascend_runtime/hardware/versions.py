"""Versions of the pack and of the packages that it uses. Imports none of them."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OWN_NAME = "ascend-video"
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PACKAGES = ("torch", "torch_npu", "mindiesd", "diffusers", "transformers")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The versions of what a video's numbers depend on, by name; packages that are not installed are left out."""
    return {OWN_NAME: _own_version()} | package_versions()


def package_versions() -> dict[str, str]:
    """As `versions`, without the pack's own, and read each time."""
    found = {name: installed(name) for name in PACKAGES}
    return {name: number for name, number in found.items() if number is not None}


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_version() -> str:
    """From pyproject.toml in the pack's folder (tomllib is of Python 3.11), else of the installed package."""
    if not PROJECT.is_file():
        return version(OWN_NAME)
    found = re.search(r'^version = "([^"]+)"$', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{PROJECT} has no version"
    return found[1]
