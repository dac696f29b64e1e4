"""A real browser on a real ComfyUI: the workflow dropped on the canvas, queued by keyboard, its video and the sampler's
report shown."""

import json
import shutil
from pathlib import Path

import published_hunyuan
import pytest
from ascend_runtime.commands import templates
from PIL import Image
from scripts.lib.comfy_browser import ComfyBrowser
from comfy_graphs import DECODE, SAMPLER, saved
from page_scripts import DROP, FIT, REPORTS, SET, VIDEO

REPOSITORY = Path(__file__).resolve().parents[2]
SCREENSHOTS = REPOSITORY / ".cache" / "artefacts"
UI_FORMAT = templates.shown_file("tiny_wan_text_to_video")
API_FORMAT = templates.api_file("tiny_wan_text_to_video")
OF_AN_IMAGE = templates.shown_file("hunyuan_video_v1_image_to_video")
SMALL = {"AscendVideoSize": {"width": 96, "height": 64, "seconds": 8 / 24}}
DROPPED = {  # file, values of widgets by node, and the video's width, height and seconds
    "ui": (UI_FORMAT, {"AscendSampler": {"steps": 2}}, (64, 64, 17 / 16)),
    "api": (API_FORMAT, {"AscendSampler": {"steps": 3}}, (64, 64, 17 / 16)),
    "image": (OF_AN_IMAGE, {"AscendSampler": {"steps": 2}, **SMALL}, (96, 64, 5 / 24)),
}

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("chromium-browser")),
    reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it",
)


@pytest.mark.parametrize("file, values, video", DROPPED.values(), ids=DROPPED)
def test_dropped_workflow_makes_a_video_that_is_shown(comfyui, file, values, video):
    if file == OF_AN_IMAGE:
        published_hunyuan.write_all(comfyui.base / "models")
        Image.new("RGB", (80, 80), "orange").save(comfyui.base / "input" / "example.png")
    steps = values["AscendSampler"]["steps"]
    api = templates.named(file)
    wanted = sorted(node["class_type"] for node in json.loads(api.read_text()).values())
    before = set(comfyui.get("/history"))
    with ComfyBrowser(comfyui) as browser:
        page, errors = browser.page, []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.evaluate("app.graph.clear()")
        page.evaluate(DROP, [file.name, file.read_text()])
        page.wait_for_function(f"app.graph.nodes.length >= {len(wanted)}")
        assert sorted(node["class_type"] for node in browser.prompt().values()) == wanted
        page.evaluate(SET, values)  # few steps, and another number each time: ComfyUI runs nothing twice
        assert page.evaluate(VIDEO) is None
        page.evaluate(FIT)  # a video outside the page is not drawn
        page.keyboard.press("Control+Enter")
        page.wait_for_function(f"({VIDEO})()", timeout=300_000)
        width, height, duration, source = page.evaluate(VIDEO)
        (prompt_id,) = set(comfyui.get("/history")) - before
        assert comfyui.wait(prompt_id)["status"]["status_str"] == "success"
        assert (width, height) == video[:2] and abs(duration - video[2]) < 0.1
        assert saved(comfyui, prompt_id).name in source
        outputs = comfyui.wait(prompt_id)["outputs"]
        report, *others = (outputs[node]["text"][0] for node in (SAMPLER, DECODE))
        page.wait_for_timeout(500)  # in which a page may remove what belongs to the job
        assert sorted(page.evaluate(REPORTS)) == sorted([report, *others]) and f" {steps} steps " in report
        (sampler,) = [node for node in browser.graph()["nodes"] if node["type"] == "AscendSampler"]
        assert report not in sampler["widgets_values"]
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"graph_{file.parent.name}_{file.stem}.png")
        assert errors == []
