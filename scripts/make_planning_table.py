"""Writes the table "What fits where" of docs/planning.md, as `python -m ascend_runtime plan` predicts it.

Run it after a change of the planner: python scripts/make_planning_table.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ascend_runtime.planner import choice, models, rates, videos
from ascend_runtime.planner.choosing.words import arrangement, duration
from ascend_runtime.specs import VideoSize
from scripts.lib.predictions import machine

PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- what fits where -->\n", "<!-- end -->"
VIDEOS = [  # model, width, height, frames
    ("Wan2.1-T2V-1.3B", 832, 480, 81), ("Wan2.1-T2V-14B", 832, 480, 81), ("Wan2.1-T2V-14B", 1280, 720, 81),
    ("Wan2.1-I2V-14B", 1280, 720, 81), ("Wan2.1-FLF2V-14B", 1280, 720, 81), ("Wan2.2-T2V-A14B", 832, 480, 81),
    ("Wan2.2-T2V-A14B", 1280, 720, 81), ("Wan2.2-I2V-A14B", 1280, 720, 81), ("Wan2.2-TI2V-5B", 1280, 704, 121),
    ("HunyuanVideo", 960, 544, 129), ("HunyuanVideo", 1280, 720, 129), ("HunyuanVideo-I2V-v1", 1280, 720, 129),
    ("HunyuanVideo-I2V-v2", 1280, 720, 129),
]  # fmt: skip
CARDS = [(1, 64), (2, 64), (8, 64), (4, 32)]  # number of A2, GB of each


def main() -> None:
    head = ["video", *(f"{number} x {memory} GB" for number, memory in CARDS)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, width, height, frames in VIDEOS:
        model = models.published(name)
        video = videos.video_of(model, VideoSize(width=width, height=height, num_frames=frames), from_image="2V" in name
                                and "T2V" not in name)  # fmt: skip
        cells = [cell(model, video, number, memory) for number, memory in CARDS]
        lines.append(f"| {name}, {width} x {height}, {frames} frames | {' | '.join(cells)} |")
        print(lines[-1])
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END, 1)[1])


def cell(model, video, number: int, memory: int) -> str:
    on = machine("a2", number, memory * 2**30)
    made = choice.choice_of(model, video, on, rates.of_card("a2"))
    if not made.fitting:
        near = [one for one in choice.nearest_sizes(model, video, on) if one]
        sizes = " or ".join(f"{one.width} x {one.height} x {one.num_frames}" for one in near)
        return f"no; {sizes} fits" if near else "no"
    chosen = made.chosen
    what = arrangement(chosen.arrangement).replace(", text encoder on the ranks", "").replace(" x ", ", ")
    what = what.replace(", text encoder on the CPU", "; text on CPU")
    what = what.replace(", VAE", "; VAE")
    return f"{duration(chosen.running)}; {chosen.memory.device_peak / 1e9:.0f} GB; {what}"


if __name__ == "__main__":
    main()
