"""Makes the pictures of workflows/ that ComfyUI's template browser shows, and that of the README.

    .venv/bin/python scripts/make_thumbnails.py                        # of all workflows
    .venv/bin/python scripts/make_thumbnails.py tiny_wan_text_to_video # of these
    .venv/bin/python scripts/make_thumbnails.py --graph --frontend DIR # docs/images/graph.png, in this page

Each is a still of a video that the embedded model makes here, in the real ComfyUI, with the name of the workflow's
model and what it does. On the pictures of other models a line says whose still it is: none pretends to be theirs.
DIR is the folder `static` of a comfyui-frontend-package.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import av
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from ascend_runtime.commands import templates  # noqa: E402
from scripts.lib.comfy_browser import ComfyBrowser  # noqa: E402
from scripts.lib.comfy_server import ComfyServer  # noqa: E402

OWN = ("tiny_wan_text_to_video", "tiny_wan_fast_text_to_video")  # workflows of the embedded model
SIDE = 900  # pixels of a picture: the template browser shows squares
QUALITY = 90
SENTENCES = {  # what the embedded model makes for each workflow, by its short name
    "tiny_wan_text_to_video": "a red circle moving right on a blue background",
    "tiny_wan_fast_text_to_video": "a white circle moving right on a purple background",
    "hunyuan_video_text_to_video": "a yellow triangle moving up on a purple background",
    "hunyuan_video_v1_image_to_video": "a green circle moving up on a purple background",
    "hunyuan_video_v2_image_to_video": "a cyan square moving right on a purple background",
    "stock_hunyuan_video_text_to_video": "a yellow triangle moving right on a gray background",
    "stock_wan2.2_i2v_a14b_image_to_video": "a cyan circle moving up on a gray background",
    "stock_wan2.2_t2v_a14b_text_to_video": "a red square moving right on a gray background",
    "stock_wan2.2_ti2v_5b_text_to_video": "a green triangle moving up on a gray background",
    "wan2.1_flf2v_14b_first_last_frame_to_video": "a yellow circle moving right on a blue background",
    "wan2.1_i2v_14b_image_to_video": "a cyan triangle moving right on a blue background",
    "wan2.1_t2v_1.3b_text_to_video": "a white square moving up on a blue background",
    "wan2.1_t2v_14b_text_to_video": "a green square moving right on a blue background",
    "wan2.2_i2v_a14b_image_to_video": "a yellow circle moving up on a black background",
    "wan2.2_t2v_a14b_text_to_video": "a red circle moving up on a black background",
    "wan2.2_t2v_a14b_text_to_video_fast": "a red triangle moving right on a black background",
    "wan2.2_ti2v_5b_image_to_video": "a green circle moving right on a black background",
    "wan2.2_ti2v_5b_text_to_video": "a cyan square moving up on a black background",
}
CHINESE = {  # what the second part of a workflow's name says
    "Tiny Wan, no download": "无需下载", "text to video": "文生视频", "text to video, fast": "文生视频，快速",
    "image to video": "图生视频", "text to video, core nodes": "核心节点",
    "image to video, core nodes": "核心节点", "first and last frame to video": "首尾帧",
}  # fmt: skip
CARD = """\
<style>
body {{ margin: 0; width: {side}px; height: {side}px; position: relative; overflow: hidden; color: white;
        font-family: "DejaVu Sans", "WenQuanYi Zen Hei", sans-serif; background: black }}
.back {{ position: absolute; inset: -15%; width: 130%; height: 130%; filter: blur(70px) brightness(.45) }}
.stills {{ position: absolute; top: 62px; left: 0; right: 0; height: 450px; display: flex; gap: 24px;
           align-items: center; justify-content: center }}
.stills img {{ border-radius: 26px; box-shadow: 0 14px 50px rgba(0, 0, 0, .55); width: 450px; height: 450px;
              flex: none }}
.stills .known {{ width: 170px; height: 170px; border-radius: 16px }}
.words {{ position: absolute; left: 54px; right: 40px; bottom: 44px }}
h1 {{ font-size: {large}px; white-space: nowrap; margin: 0 0 12px; letter-spacing: -1px }}
h2 {{ font-size: 39px; margin: 0 0 24px; font-weight: normal; white-space: nowrap }}
p {{ font-size: 27px; margin: 0; opacity: .8; line-height: 1.45 }}
</style>
<img class="back" src="{still}">
<div class="stills">{first}<img src="{still}">{last}</div>
<div class="words"><h1>{model}</h1><h2>{task}</h2><p>{size}</p><p>{whose}</p></div>
"""
WHOSE = "still: Tiny Wan, the model in this pack"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="short names (default: all)")
    parser.add_argument("--graph", action="store_true", help="the picture of the README instead")
    parser.add_argument("--frontend", metavar="DIR", type=Path, help="the files of another version of the page")
    arguments = parser.parse_args()
    options = ["--front-end-root", str(arguments.frontend.resolve())] if arguments.frontend else []
    with ComfyServer(extra_args=options) as server:
        if arguments.graph:
            return picture_of_graph(server).save(saying(REPOSITORY / "docs" / "images" / "graph.png"), optimize=True)
        names = arguments.names or templates.SHORT
        videos = {short: frames_of(run(server, short if short in OWN else OWN[0], SENTENCES[short]))
                  for short in names}  # fmt: skip
        with ComfyBrowser(server, size=(SIDE, SIDE)) as browser:
            for short, frames in videos.items():
                target = templates.shown_file(short).with_suffix(".jpg")
                card(browser.page, short, frames).save(saying(target), quality=QUALITY, optimize=True)


def saying(target):
    print(target.relative_to(REPOSITORY))
    return target


def run(server, short, sentence):
    """The video (a Path) that a workflow of the embedded model makes of a sentence."""
    prompt = json.loads(templates.api_file(short).read_text())
    prompt["5"]["inputs"]["text"] = sentence
    outputs = server.wait(server.queue(prompt), timeout=3600)["outputs"]
    video = next(file for output in outputs.values() for file in output.get("images", []))
    return server.output / video["subfolder"] / video["filename"]


def frames_of(video):
    with av.open(str(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def card(page, short, frames):
    """The picture of a workflow, of the frames of a video: the middle one, and next to it those that a workflow
    from images would begin and end with."""
    model, task = templates.SHOWN[short].split(" - ")
    graph = json.loads(templates.api_file(short).read_text())
    images = [node for node in graph.values() if node["class_type"] == "LoadImage"]
    first, last = (f'<img class="known" src="{address(one)}">' if given else "" for one, given in
                   ((frames[0], images), (frames[-1], len(images) == 2)))  # fmt: skip
    words = f"“{SENTENCES[short]}”" if short in OWN else WHOSE
    page.set_content(CARD.format(
        side=SIDE, still=address(frames[len(frames) // 2]), first=first, last=last, model=html.escape(model),
        large=74 if len(model) < 18 else 62 if len(model) < 20 else 56,
        task=html.escape(f"{task} · {CHINESE[task]}"), size=size_of(graph),
        whose=html.escape(words),
    ))  # fmt: skip
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def size_of(graph):
    """The size and the seconds of the workflow's video, in words."""
    (inputs,) = [node["inputs"] for node in graph.values() if isinstance(node["inputs"].get("width"), int)]
    seconds = inputs["seconds"] if "seconds" in inputs else (inputs["length"] - 1) / graph["10"]["inputs"]["fps"]
    return f"{inputs['width']} x {inputs['height']}, {seconds:.1f} s".replace(".0 s", " s")


def address(picture):
    """A data URL of a picture, enlarged so that it is smooth."""
    stream = io.BytesIO()
    picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def picture_of_graph(server):
    """The first workflow in ComfyUI's page after a run, with its video."""
    graph = json.loads(templates.shown_file(OWN[0]).read_text())
    boxes = [group["bounding"] for group in graph["groups"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    with ComfyBrowser(server, size=(1600, 860)) as browser:
        browser.page.evaluate("""async () => {
            const settings = {'Comfy.Minimap.Visible': false, 'Comfy.Graph.CanvasInfo': false,
                              'LiteGraph.Canvas.MinFontSizeForLOD': 0}
            for (const [name, value] of Object.entries(settings))
                await app.extensionManager.setting.set(name, value)
        }""")
        browser.open(graph)
        browser.show((left, top, right - left, bottom - top), margin=90)
        browser.page.keyboard.press("Control+Enter")
        shown = "[...document.querySelectorAll('video')].some(video => video.videoWidth)"
        browser.page.wait_for_function(shown, timeout=600_000)
        browser.page.wait_for_timeout(3000)
        return Image.open(io.BytesIO(browser.page.screenshot())).convert("RGB")


if __name__ == "__main__":
    main()
