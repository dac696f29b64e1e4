"""Codes of errors about the host, files, loading, memory and deaths of ranks, by which docs/errors.md is looked up.

An error of an argument needs no code, as its text says what the argument can be.
"""

from __future__ import annotations

# Code -> its title in docs/errors.md. AV-10xx: driver, CANN and packages. 11xx: ports, threads, variables, limits.
# 12xx: memory. 13xx: files. 14xx: loading. 15xx: ranks that die or do not answer. 16xx: numbers. 17xx: ComfyUI.
CODES: dict[str, str] = {
    "AV-1601": "A step of denoising overflows",
    "AV-1602": "A weight in memory is not finite",
    "AV-1603": "An input is not finite",
    "AV-1604": "An accelerator makes values that are not finite",
    "AV-1605": "A text encoder overflows",
    "AV-1606": "The decoded video is not finite",
    "AV-1607": "The encoded video is not finite",
    "AV-1608": "Frames of one colour",
    "AV-1609": "Frames that are all the same",
}


def coded(code: str, text: str) -> str:
    """An error's text with its code in front."""
    assert code in CODES, code
    return f"{code}: {text}"
