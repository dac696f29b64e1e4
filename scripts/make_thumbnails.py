"""Makes the pictures of workflows/ that ComfyUI's template browser shows.

    .venv/bin/python scripts/make_thumbnails.py --run tiny_wan_text_to_video  # frames of the video that it makes
    .venv/bin/python scripts/make_thumbnails.py wan2.2_t2v_a14b_text_to_video # its graph, if it cannot be run
"""

import argparse
import io
import json
import sys
from pathlib import Path

import av
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = REPOSITORY / "workflows"
sys.path.insert(0, str(REPOSITORY))
from scripts.lib.comfy_browser import ComfyBrowser  # noqa: E402
from scripts.lib.comfy_server import ComfyServer  # noqa: E402

COLUMNS, ROWS = 3, 3  # of frames: the template browser shows squares
WIDTH = 1200  # pixels of a thumbnail
GAP = 6
QUALITY = 88


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="+", choices=[file.stem for file in WORKFLOWS.glob("*.json")])
    parser.add_argument("--run", action="store_true", help="run the workflow and show frames of its video")
    arguments = parser.parse_args()
    with ComfyServer() as server:
        for name in arguments.names:
            save(frame_sheet(run(server, name)) if arguments.run else graph_picture(server, name), name)


def run(server, name):
    """The video (a Path) that a workflow makes."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    outputs = server.wait(server.queue(prompt), timeout=3600)["outputs"]
    video = next(file for output in outputs.values() for file in output.get("images", []))
    return server.output / video["subfolder"] / video["filename"]


def frame_sheet(video):
    """Frames of a video, evenly spread in time, in rows."""
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    count = COLUMNS * ROWS
    chosen = [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]
    width = (WIDTH - GAP * (COLUMNS - 1)) // COLUMNS
    height = round(width * chosen[0].height / chosen[0].width)
    sheet = Image.new("RGB", (WIDTH, ROWS * height + GAP * (ROWS - 1)), "white")
    for i, frame in enumerate(chosen):
        row, column = divmod(i, COLUMNS)
        sheet.paste(frame.resize((width, height), Image.Resampling.LANCZOS),
                    (column * (width + GAP), row * (height + GAP)))
    return sheet


def graph_picture(server, name):
    """The workflow's graph as ComfyUI draws it, without the page's own bars."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    boxes = [group["bounding"] for group in graph["groups"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    size = (WIDTH, round(WIDTH * (bottom - top) / (right - left)))
    with ComfyBrowser(server, size=size, scale=2) as browser:
        browser.open(graph)
        browser.hide_bars()
        browser.show((left, top, right - left, bottom - top), margin=12)
        picture = Image.open(io.BytesIO(browser.page.screenshot())).convert("RGB")
    return picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)


def save(picture, name):
    target = WORKFLOWS / f"{name}.jpg"
    picture.save(target, quality=QUALITY, optimize=True)
    print(f"{target.relative_to(REPOSITORY)}: {picture.width} x {picture.height}, {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
