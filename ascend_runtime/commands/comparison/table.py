"""The rows of a comparison, and the table that they make: for a reader, and for a program."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

COLUMNS = ("setting", "denoise", "a step", "speed-up", "predicted", "PSNR", "SSIM", "density", "FLOPs saved")
PLAIN = "plain"


@dataclass(frozen=True)
class Row:
    """One setting's run.

    seconds: of the denoise loop. step: of these, a step's. speed_up: of the loop against the plain one's; predicted:
    the same, by the FLOPs. psnr (dB) and ssim: of the frames against the plain ones. density: the mean of sparse
    attention's. saved: FLOPs, a share. refused: why the ranks did not run it; all else is then nan.
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
            return [self.setting, *["-"] * (len(COLUMNS) - 1)]
        return [
            self.setting, f"{self.seconds:.2f} s", f"{self.step:.3f} s", f"{self.speed_up:.2f}x",
            f"{self.predicted:.2f}x", "equal" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB", f"{self.ssim:.4f}",
            f"{self.density:.0%}", f"{self.saved:.0%}",
        ]  # fmt: skip

    def facts(self) -> dict:
        """For JSON, which knows neither inf nor nan: `equal` tells of the first, null stands for both."""
        facts = {name: _finite(value) for name, value in asdict(self).items()}
        return {**facts, "equal": math.isinf(self.psnr)}


def markdown(rows: list[Row]) -> str:
    """A table, and under it why what is missing in it was refused."""
    cells = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = [_line(line, widths) for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths)) + "|")
    refused = [f"\n{row.setting} was refused: {row.refused}" for row in rows if row.refused is not None]
    return "\n".join(lines + refused) + "\n"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
