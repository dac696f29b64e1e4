"""Pictures of a run: contact sheets of clips, and loss curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN_FRAMES = (0, 4, 8, 12, 16)


def contact_sheet(path: Path, clips: list[np.ndarray], titles: list[str], columns: int = 3) -> None:
    """A grid of clips `[T,H,W,3]` in 0..1, five frames of each in a row under its title."""
    rows = -(-len(clips) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 1.08 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, clip, title in zip(axes.flat, clips, titles):
        strip = [np.pad(clip[i].clip(0, 1), ((0, 0), (0, 2), (0, 0)), constant_values=1) for i in SHOWN_FRAMES]
        axis.imshow(np.concatenate(strip, axis=1), interpolation="nearest")
        axis.set_title(title, fontsize=7, pad=2)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def loss_curve(path: Path, name: str, losses: list[tuple[float, float]], window: int = 30) -> None:
    """Loss over minutes, with a running mean."""
    minutes, values = np.array(losses).T
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.semilogy(minutes, values, linewidth=0.4, alpha=0.4)
    if len(values) >= window:
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.semilogy(minutes[window - 1 :], mean, linewidth=1.4)
    axis.set(xlabel="minutes", ylabel="loss", title=name)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
