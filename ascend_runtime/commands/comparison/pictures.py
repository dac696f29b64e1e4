"""The plot of a comparison, speed-up against PSNR, and the clip with the videos side by side."""

from __future__ import annotations

import math
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

from .table import ResultRow

MIN_VIDEO_WIDTH, MAX_CLIP_WIDTH = 320, 1920  # pixels
FONT, LINES, GAP = 13, 3, 8
DOT = 9  # pixels: radius of a point in the plot
INK, PAPER = "#20242c", "#ffffff"


def plot(rows: list[ResultRow], path: Path) -> None:
    """Writes a PNG with a labelled point for each row. Videos that equal the plain one are on a line at the top.

    rows: the plain video's first.
    """
    done = [row for row in rows if row.refused is None]
    finite = [row.psnr for row in done if math.isfinite(row.psnr)] or [40.0]
    equal = max(finite) + max(3.0, 0.15 * (max(finite) - min(finite)))
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(equal, color="grey", linewidth=1, linestyle=":")
    axes.axvline(1.0, color="grey", linewidth=1, linestyle=":")
    for row, colour in zip(done, [INK, *matplotlib.colormaps["tab10"].colors * math.ceil(len(done) / 10)]):
        axes.scatter(row.speed_up, min(row.psnr, equal), s=60, color=[colour], zorder=3)
    axes.annotate("equal", (1.0, equal), xycoords=("axes fraction", "data"), xytext=(-4, 3), ha="right",
                  textcoords="offset points", color="grey")  # fmt: skip
    axes.set_xlabel("speed-up of the denoise loop")
    axes.set_ylabel("PSNR to the plain video (dB)")
    axes.grid(alpha=0.3)
    axes.margins(0.15)
    figure.draw_without_rendering()  # computes the layout, which _annotate needs
    _annotate(axes, {row.setting: (row.speed_up, min(row.psnr, equal)) for row in done})
    figure.savefig(path)


def _annotate(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Labels each point in its colour, moved down until the label overlaps no other label and no point."""
    middle = sum(axes.get_xlim()) / 2
    places = axes.transData.transform([*points.values()])
    taken = [Bbox.from_bounds(x - DOT, y - DOT, 2 * DOT, 2 * DOT) for x, y in places]
    for (name, point), dots in zip(points.items(), axes.collections):
        side = 1 if point[0] <= middle else -1
        text = axes.annotate(
            textwrap.fill(name, 40), point, xytext=(side * 8, -2), textcoords="offset points", fontsize=7, va="top",
            ha="left" if side > 0 else "right", color=dots.get_facecolor()[0],
        )  # fmt: skip
        while any(text.get_window_extent().overlaps(box) for box in taken) and text.xyann[1] > -200:
            text.xyann = (side * 8, text.xyann[1] - 4)
        taken.append(text.get_window_extent())


def clip(videos: dict[str, np.ndarray], path: Path, fps: float) -> None:
    """Writes an MP4 of videos side by side, each below its name. videos: uint8 [T,H,W,3], all of the same shape."""
    columns = len(videos) if len(videos) <= 3 else math.ceil(math.sqrt(len(videos)))
    frames, height, width = next(iter(videos.values())).shape[:3]
    shown = _shown(width, columns)
    size = shown, round(height * shown / width / 2) * 2
    header = (FONT + 4) * LINES // 2 * 2
    cell = size[0] + GAP, size[1] + header
    titles = {name: _title(name, (size[0], header)) for name in videos}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.width, stream.height = cell[0] * columns - GAP, cell[1] * math.ceil(len(videos) / columns)
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            sheet = Image.new("RGB", (stream.width, stream.height), PAPER)
            for place, (name, video) in enumerate(videos.items()):
                corner = place % columns * cell[0], place // columns * cell[1]
                sheet.paste(titles[name], corner)
                sheet.paste(_resized(video[number], size), (corner[0], corner[1] + header))
            for packet in stream.encode(av.VideoFrame.from_image(sheet)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _shown(width: int, columns: int) -> int:
    """The width of a video in the clip, an even number. Small videos are enlarged by an integer factor."""
    enlarged = width * max(1, math.ceil(MIN_VIDEO_WIDTH / width))
    return min(enlarged, MAX_CLIP_WIDTH // columns) // 2 * 2


def _resized(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(frame)
    enlarged = size[0] % image.width == 0
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _title(name: str, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, PAPER)
    lines = [part for line in name.split("\n") for part in textwrap.wrap(line, size[0] // (FONT // 2 + 1))]
    text, font = "\n".join(lines[:LINES]), ImageFont.load_default(FONT)
    ImageDraw.Draw(picture).multiline_text((4, 2), text, fill=INK, font=font)
    return picture
