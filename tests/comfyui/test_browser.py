"""A real browser on a real ComfyUI: the workflow dropped on the canvas, queued by keyboard, its video and the sampler's
report shown."""

import json
import shutil
from pathlib import Path

import pytest
from scripts.lib.comfy_browser import ComfyBrowser
from comfy_graphs import SAMPLER, saved

REPOSITORY = Path(__file__).resolve().parents[2]
SCREENSHOTS = REPOSITORY / ".cache" / "artefacts"
UI_FORMAT = REPOSITORY / "workflows" / "tiny_wan_text_to_video.json"
API_FORMAT = REPOSITORY / "workflows" / "api" / "tiny_wan_text_to_video.json"

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("chromium-browser")),
    reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it",
)

DROP = """([name, text]) => {
    const carried = new DataTransfer()
    carried.items.add(new File([text], name, {type: 'application/json'}))
    const canvas = document.querySelector('#graph-canvas')
    const view = canvas.getBoundingClientRect()
    const where = {clientX: view.x + view.width / 2, clientY: view.y + view.height / 2, bubbles: true, cancelable: true}
    canvas.dispatchEvent(new DragEvent('drop', {...where, dataTransfer: carried}))
}"""


SET_STEPS = """steps => {
    app.graph.nodes.find(n => n.type === 'AscendSampler').widgets.find(w => w.name === 'steps').value = steps
}"""
FIT = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
REPORTS = "[...document.querySelectorAll('.ascend-report')].map(report => report.textContent)"
VIDEO = """() => {
    const shown = [...document.querySelectorAll('video')].filter(v => v.videoWidth && v.getClientRects().length)
    return shown.length ? [shown[0].videoWidth, shown[0].videoHeight, shown[0].duration, shown[0].currentSrc] : null
}"""


@pytest.mark.parametrize("file, steps", [(UI_FORMAT, 2), (API_FORMAT, 3)], ids=["ui", "api"])
def test_dropped_workflow_makes_a_video_that_is_shown(comfyui, file, steps):
    wanted = sorted(node["class_type"] for node in json.loads(API_FORMAT.read_text()).values())
    before = set(comfyui.get("/history"))
    with ComfyBrowser(comfyui) as browser:
        page, errors = browser.page, []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.evaluate("app.graph.clear()")
        page.evaluate(DROP, [file.name, file.read_text()])
        page.wait_for_function(f"app.graph.nodes.length >= {len(wanted)}")
        assert sorted(node["class_type"] for node in browser.prompt().values()) == wanted
        page.evaluate(SET_STEPS, steps)  # few, and another number each time: ComfyUI runs nothing twice
        assert page.evaluate(VIDEO) is None
        page.evaluate(FIT)  # a video outside the page is not drawn
        page.keyboard.press("Control+Enter")
        page.wait_for_function(f"({VIDEO})()", timeout=300_000)
        width, height, duration, source = page.evaluate(VIDEO)
        (prompt_id,) = set(comfyui.get("/history")) - before
        assert comfyui.wait(prompt_id)["status"]["status_str"] == "success"
        assert (width, height) == (64, 64) and abs(duration - 17 / 16) < 0.1
        assert saved(comfyui, prompt_id).name in source
        (report,) = comfyui.wait(prompt_id)["outputs"][SAMPLER]["text"]
        page.wait_for_timeout(500)  # in which a page may remove what belongs to the job
        assert page.evaluate(REPORTS) == [report] and report.startswith(f"{steps} steps, ")
        (sampler,) = [node for node in browser.graph()["nodes"] if node["type"] == "AscendSampler"]
        assert report not in sampler["widgets_values"]
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"graph_{file.parent.name}.png")
        assert errors == []
