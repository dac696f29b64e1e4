"""The synthetic world: its words, their combinations, the held-out split, and how clips are drawn.

A clip shows one shape of one colour that moves in one direction on a plain background:
"a red circle moving right on a blue background". Training and checking both import it from here.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass

import torch

SIZE, NUM_FRAMES, FPS = 64, 17, 16
SHAPES = ("circle", "square", "triangle")
COLOURS = {  # of the object, RGB in 0..1
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "yellow": (0.95, 0.85, 0.10),
    "white": (1.00, 1.00, 1.00),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.04),
    "gray": (0.50, 0.50, 0.50),
    "blue": (0.10, 0.15, 0.80),
    "purple": (0.50, 0.10, 0.55),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x right, y down
ATTRIBUTES = ("shape", "colour", "background", "direction")

# All as fractions of the frame's side. The path's centre stays near the frame's: little variation is learned fast.
RADIUS = (0.18, 0.22)
TRAVEL = (0.28, 0.34)  # over the whole clip
JITTER_ALONG, JITTER_ACROSS = 0.03, 0.08  # of the path's centre, in both directions


@dataclass(frozen=True)
class Scene:
    """The four attributes of a caption, which the reader reads."""

    shape: str
    colour: str
    background: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every combination: 3 shapes x 5 colours x 4 backgrounds x 4 directions = 240."""
    return [Scene(*values) for values in itertools.product(SHAPES, COLOURS, BACKGROUNDS, DIRECTIONS)]


def is_held_out(scene: Scene) -> bool:
    """One colour of every (shape, background, direction) is not used in training: 48 scenes, with each word equally
    often."""
    orders = (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS), tuple(DIRECTIONS))
    return sum(order.index(value) for order, value in zip(orders, astuple(scene))) % len(COLOURS) == 0


def train_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def held_out_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if is_held_out(scene)]


def draw_scenes(scenes: list[Scene], count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes drawn with replacement."""
    return [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance (exact up to corners) to a shape centred at 0; the three have areas 3.1, 3.1 and 1.9 radius^2."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":  # equilateral, apex up, circumradius 1.2 radius
        return torch.maximum(y, 0.75**0.5 * x.abs() - 0.5 * y) - 0.6 * radius
    raise ValueError(f"shape {shape!r} is not in the world; choose one of {SHAPES}")


def render(scenes: list[Scene], generator: torch.Generator, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """Clips `[B,3,T,H,W]` in -1..1; size, place and speed come from `generator`.

    The object stays completely in the frame. With fewer frames, clips show a part of the same motion.
    """
    count = len(scenes)
    radius, travel, along, across, start = torch.rand(5, count, generator=generator)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * radius
    travel = TRAVEL[0] + (TRAVEL[1] - TRAVEL[0]) * travel
    along = 0.5 + JITTER_ALONG * (2 * along - 1)
    across = 0.5 + JITTER_ACROSS * (2 * across - 1)
    step = torch.arange(num_frames) + (start * (NUM_FRAMES - num_frames + 1)).floor()[:, None]
    offset = travel[:, None] * (step / (NUM_FRAMES - 1) - 0.5)  # [B,T]

    pixels = (torch.arange(SIZE) + 0.5) / SIZE
    clips = torch.empty(count, 3, num_frames, SIZE, SIZE)
    for i, scene in enumerate(scenes):
        dx, dy = DIRECTIONS[scene.direction]
        middle_x, middle_y = (along[i], across[i]) if dx else (across[i], along[i])
        x = pixels[None, None, :] - (middle_x + dx * offset[i])[:, None, None]
        y = pixels[None, :, None] - (middle_y + dy * offset[i])[:, None, None]
        x, y = torch.broadcast_tensors(x, y)
        cover = (0.5 - SIZE * signed_distance(scene.shape, x, y, radius[i])).clamp(0, 1)  # one pixel of antialiasing
        front = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1)
        back = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1, 1)
        clips[i] = (back + (front - back) * cover) * 2 - 1
    return clips
