"""Shapes of tensors by name."""

from __future__ import annotations

from ..checkpoints.faults import shown

Shapes = dict[str, tuple[int, ...]]


def count(shapes: Shapes, prefix: str) -> int:
    """The number of blocks, numbered from 0 after `prefix`. Raises ValueError if a number is missing."""
    found = {name.removeprefix(prefix).split(".")[0]: name for name in shapes if name.startswith(prefix)}
    wanted = [str(number) for number in range(len(found))]
    missing = next((number for number in wanted if number not in found), None)
    if missing is not None:
        strange = [name for number, name in found.items() if number not in wanted]
        raise ValueError(f"there is no {prefix}{missing}, but {', '.join(map(shown, strange[:3]))}")
    return len(found)
