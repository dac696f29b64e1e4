"""ComfyUI's own template in a real browser: its loaders swapped from the canvas' menu, run, swapped back."""

import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

import published_models
import pytest
from page_scripts import DROP, EMPTY, FIT, SET, TOASTS, VIDEO
from scripts.lib.comfy_browser import ComfyBrowser

TEMPLATE = "text_to_video_wan"
PACKAGE = find_spec("comfyui_workflow_templates_media_video")
SMALL = {"EmptyHunyuanLatentVideo": {"width": 96, "height": 64, "length": 9},
         "KSampler": {"steps": 2, "control_after_generate": "fixed"}}  # fmt: skip
LOADERS = ["CLIPLoader", "UNETLoader", "VAELoader"]
TO_RANKS, BACK = "Swap loaders to run on all ranks (Ascend)", "Swap loaders back to core's (Ascend)"
TO_RANKS_ZH = "替换加载器，在所有 rank 上运行（昇腾）"

pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium") and not shutil.which("chromium-browser"),
                       reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"),
    pytest.mark.skipif(PACKAGE is None, reason="comfyui_workflow_templates_media_video is not installed"),
]  # fmt: skip

TAB = """() => {
    const {workflow} = app.extensionManager
    return [workflow.openWorkflows.length, workflow.activeWorkflow.isModified]
}"""


def choose(page, entry):
    """Takes an entry of the canvas' menu."""
    x, y = page.evaluate(EMPTY)
    page.mouse.click(x, y, button="right")
    page.locator(".litemenu-entry", has_text=entry).click()


def new_prompt(comfyui, before):
    """The prompt that ComfyUI has finished since `before`."""
    deadline = time.monotonic() + 200
    while not (new := set(comfyui.get("/history")) - before):
        assert time.monotonic() < deadline, f"no prompt ran: {comfyui.get('/queue')}\n{comfyui.log[-3000:]}"
        time.sleep(0.5)
    return new.pop()


def loaders(graph):
    return sorted(node["type"] for node in graph["nodes"] if node["type"].endswith("Loader"))


def wait_for_types(page, types):
    page.wait_for_function("types => types.every(type => app.graph.nodes.some(node => node.type === type))", arg=types)


@pytest.fixture(scope="module")
def browser(comfyui):
    published_models.write_all(comfyui.base / "models")
    with ComfyBrowser(comfyui) as browser:
        yield browser


def test_stock_template_runs_on_the_ranks_and_is_swapped_back(comfyui, browser):
    file = Path(PACKAGE.submodule_search_locations[0]) / "templates" / f"{TEMPLATE}.json"
    page, errors = browser.page, []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, [file.name, file.read_text()])
    wait_for_types(page, [*LOADERS, *SMALL])
    page.evaluate(SET, SMALL)
    page.evaluate(FIT)
    stock, (tabs, _) = browser.graph(), page.evaluate(TAB)
    choose(page, TO_RANKS)
    wait_for_types(page, [f"Ascend{name}" for name in LOADERS])
    swapped = browser.graph()
    assert loaders(swapped) == [f"Ascend{name}" for name in LOADERS]
    assert "3 loaders swapped" in page.evaluate(TOASTS)
    assert page.evaluate(TAB) == [tabs, True], "the swap is no change of the tab that was open"
    classes = [node["class_type"] for node in browser.prompt().values()]
    assert {f"Ascend{name}" for name in LOADERS} < set(classes) and not set(LOADERS) & set(classes)
    before = set(comfyui.get("/history"))
    page.evaluate(FIT)
    page.keyboard.press("Control+Enter")
    assert comfyui.wait(new_prompt(comfyui, before))["status"]["status_str"] == "success"
    page.wait_for_function(f"({VIDEO})()")
    assert page.evaluate(VIDEO)[:2] == [96, 64]
    choose(page, BACK)
    wait_for_types(page, LOADERS)
    assert {**browser.graph(), "extra": stock["extra"]} == stock  # extra has what the canvas shows
    page.keyboard.press("Control+z")
    wait_for_types(page, [f"Ascend{name}" for name in LOADERS])
    assert errors == []


def test_menu_is_chinese_and_lists_what_is_left(browser):
    graph = {"nodes": [{"id": 1, "type": "CheckpointLoaderSimple", "pos": [0, 0], "size": [300, 100], "flags": {},
                        "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {},
                        "widgets_values": ["all.safetensors"]}],
             "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4}  # fmt: skip
    page = browser.page
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        browser.open(graph)
        choose(page, TO_RANKS_ZH)
        page.wait_for_function(f"{TOASTS}.some(text => text.includes('没有可替换的加载器'))")
        said = "\n".join(page.evaluate(TOASTS))
        assert "未替换：" in said and "CheckpointLoaderSimple" in said and "its name does not say" in said
        assert loaders(browser.graph()) == []
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")


def test_route_answers_errors_as_json(comfyui):
    for body in ([], {"workflow": 3}, {"workflow": {"nodes": 3}}):
        with pytest.raises(HTTPError) as caught:
            comfyui.post("/ascend_video/adopt", body)
        assert caught.value.code == 400 and "error" in caught.value.read().decode()
