"""The rows of a comparison, as a Markdown table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

COMPARISON_COLUMNS = ("setting", "denoise", "a step", "speed-up", "predicted", "PSNR", "SSIM", "density", "FLOPs saved")
PLAIN_VIDEO = "plain"


@dataclass(frozen=True)
class ResultRow:
    """The result of one setting.

    seconds: of the denoise loop. step: seconds per step. speed_up: of the loop relative to the plain video; predicted:
    the same from the FLOPs. psnr (dB), ssim: of the frames relative to the plain video. density: mean density of sparse
    attention. saved: fraction of FLOPs saved. refused: why the ranks rejected it; then all numbers are nan.
    """

    setting: str
    seconds: float = math.nan
    step: float = math.nan
    speed_up: float = math.nan
    predicted: float = math.nan
    psnr: float = math.nan
    ssim: float = math.nan
    density: float = math.nan
    saved: float = math.nan
    refused: str | None = None

    def cells(self) -> list[str]:
        if self.refused is not None:
            return [self.setting, *["-"] * (len(COMPARISON_COLUMNS) - 1)]
        return [
            self.setting, f"{self.seconds:.2f} s", f"{self.step:.3f} s", f"{self.speed_up:.2f}x",
            f"{self.predicted:.2f}x", "equal" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB", f"{self.ssim:.4f}",
            f"{self.density:.0%}", f"{self.saved:.0%}",
        ]  # fmt: skip

    def facts(self) -> dict:
        """The row for JSON, with null for inf and nan. `equal`: whether the PSNR is infinite."""
        facts = {name: _finite(value) for name, value in asdict(self).items()}
        return {**facts, "equal": math.isinf(self.psnr)}


def markdown(rows: list[ResultRow]) -> str:
    """A Markdown table, and below it the errors of rejected settings."""
    cells = [list(COMPARISON_COLUMNS), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COMPARISON_COLUMNS))]
    lines = [_line(line, widths) for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths)) + "|")
    refused = [f"\n{row.setting} was rejected: {row.refused}" for row in rows if row.refused is not None]
    return "\n".join(lines + refused) + "\n"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
