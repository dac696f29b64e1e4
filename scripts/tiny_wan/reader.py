"""Reads shape, colour, background and direction off frames with plain numpy; it knows the palette, not the caption."""

from __future__ import annotations

import numpy as np

from . import world

BORDER = 2  # border pixels of a frame that show only background
MIN_AREA, MAX_AREA = 0.03, 0.45  # of the frame; other sizes are not an object
MIN_OVERLAP = 0.75  # of the object with its ideal shape, intersection over union
MIN_TRAVEL = 4.0  # pixels over the clip
MAX_COLOUR_ERROR = 0.35  # RGB distance to the palette's nearest
UNREAD = "?"


def read(frames: np.ndarray) -> dict[str, str]:
    """The four attributes of frames `[T,H,W,3]` in 0..1; `UNREAD` where the frames do not show one clearly."""
    back = np.median(_border(frames), axis=0)
    masks = object_masks(frames, back)
    seen = [i for i, mask in enumerate(masks) if MIN_AREA < mask.mean() < MAX_AREA]
    background = nearest(back, world.BACKGROUNDS)
    if len(seen) < max(2, len(frames) // 2):
        return {"shape": UNREAD, "colour": UNREAD, "background": background, "direction": UNREAD}
    front = np.median(np.concatenate([frames[i][masks[i]] for i in seen]), axis=0)
    return {
        "shape": read_shape([masks[i] for i in seen]),
        "colour": nearest(front, world.COLOURS),
        "background": background,
        "direction": read_direction(np.array(seen), np.array([centre(masks[i]) for i in seen])),
    }


def _border(frames: np.ndarray) -> np.ndarray:
    inside = np.zeros(frames.shape[1:3], bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    return frames[:, ~inside].reshape(-1, 3)


def object_masks(frames: np.ndarray, back: np.ndarray) -> np.ndarray:
    """`[T,H,W]`: pixels nearer to the object's colour, taken as the strongest contrast seen, than to the background."""
    contrast = np.linalg.norm(frames - back, axis=-1)
    return contrast > 0.5 * max(np.quantile(contrast, 0.97), 0.2)


def nearest(colour: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    best = min(distances, key=distances.get)
    return best if distances[best] < MAX_COLOUR_ERROR else UNREAD


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) in pixels."""
    return np.argwhere(mask).mean(axis=0)[::-1]


def read_shape(masks: list[np.ndarray]) -> str:
    """The shape whose ideal with the same area and centre has the best overlap, averaged over the frames."""
    overlap = {name: float(np.mean([_overlap(mask, name) for mask in masks])) for name in world.SHAPES}
    best = max(overlap, key=overlap.get)
    return best if overlap[best] > MIN_OVERLAP else UNREAD


def _overlap(mask: np.ndarray, shape: str) -> float:
    height, width = mask.shape
    x = np.arange(width)[None] - centre(mask)[0]
    y = np.arange(height)[:, None] - centre(mask)[1]
    area = mask.sum()
    if shape == "circle":
        ideal = x**2 + y**2 < area / np.pi
    elif shape == "square":
        ideal = np.maximum(abs(x), abs(y)) < np.sqrt(area) / 2
    elif shape == "triangle":  # equilateral, apex up: area = 3 sqrt(3) inradius^2
        ideal = np.maximum(y, np.sqrt(0.75) * abs(x) - y / 2) < np.sqrt(area / 27**0.5)
    else:
        raise ValueError(f"no ideal for shape {shape!r}; known: circle, square, triangle")
    return (mask & ideal).sum() / (mask | ideal).sum()


def read_direction(times: np.ndarray, centres: np.ndarray) -> str:
    """The axis and sign of a straight line fitted through the centres `[T,2]`."""
    travel = np.polyfit(times, centres, 1)[0] * (times[-1] - times[0])
    along = {name: float(travel @ np.array(step)) for name, step in world.DIRECTIONS.items()}
    best = max(along, key=along.get)
    return best if along[best] > MIN_TRAVEL else UNREAD
