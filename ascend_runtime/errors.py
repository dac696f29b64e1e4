"""Codes of errors about the host, files, loading, memory and deaths of ranks, by which docs/errors.md is looked up.

An error of an argument needs no code, as its text says what the argument can be.
"""

from __future__ import annotations

# Code -> its title in docs/errors.md. AV-10xx: driver, CANN and packages. 11xx: ports, threads, variables, limits.
# 12xx: memory. 13xx: files. 14xx: loading. 15xx: ranks that die or do not answer. 16xx: numbers. 17xx: ComfyUI.
CODES: dict[str, str] = {}


def coded(code: str, text: str) -> str:
    """An error's text with its code in front."""
    assert code in CODES, code
    return f"{code}: {text}"
