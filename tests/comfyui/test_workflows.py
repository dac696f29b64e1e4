"""The shipped workflows: UI and API format say the same, open cleanly, lie well, and are in the template browser."""

import io
import json
import re
import urllib.parse
import urllib.request
from itertools import combinations
from pathlib import Path

import pytest
from ascend_runtime.commands import templates
from ascend_runtime.commands.queue import QueueError, address
from ascend_runtime.commands.queue import workflow as queued
from scripts.lib.comfy_browser import MISSING_MODELS, NODES_2, ComfyBrowser, chromium
from PIL import Image
from shipped_workflows import NAMES, WORKFLOWS, api, ui

REPOSITORY = Path(__file__).resolve().parents[2]
ARTEFACTS = REPOSITORY / ".cache" / "artefacts"
SHOWING_ALL_NODES = [  # every node that the others have, one of these has too
    "hunyuan_video_v1_image_to_video",
    "stock_hunyuan_video_text_to_video",
    "stock_wan2.2_i2v_a14b_image_to_video",
    "stock_wan2.2_ti2v_5b_text_to_video",
    "tiny_wan_fast_text_to_video",
    "wan2.1_flf2v_14b_first_last_frame_to_video",
    "wan2.2_i2v_a14b_image_to_video",
    "wan2.2_t2v_a14b_text_to_video_fast",
]
TITLE_HEIGHT = 30  # of a node, above its position
NOTES = ("MarkdownNote", "Note")  # of the page alone: the API format has none

needs_chromium = pytest.mark.skipif(
    not chromium(), reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"
)


def without_titles(prompt) -> dict:
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def as_saved(prompt, saved) -> dict:
    """A page's prompt, without inputs that core nodes of newer ComfyUIs have and the `saved` prompt has not."""
    prompt = without_titles(prompt)
    for number, node in prompt.items():
        if not node["class_type"].startswith("Ascend"):
            known = saved.get(number, {"inputs": {}})["inputs"]
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
    return prompt


def own_titles(prompt) -> dict:
    """Titles of the pack's nodes; those of core nodes change with ComfyUI's version."""
    ours = {number: node for number, node in prompt.items() if node["class_type"].startswith("Ascend")}
    return {number: node["_meta"]["title"] for number, node in ours.items()}


def box(node) -> tuple:
    """left, top, right, bottom, with the title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def inside(inner, outer) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def apart(one, other) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_every_workflow_has_both_formats_and_a_picture():
    shown = sorted(set(templates.SHOWN.values()))
    assert sorted(file.stem for file in (WORKFLOWS / "api").glob("*.json")) == sorted(templates.SHOWN)
    for ending in ("json", "jpg"):
        assert sorted(file.stem for file in WORKFLOWS.glob(f"*.{ending}")) == shown


def test_names_fit_addresses_and_every_disk():
    """The page writes a name into an address without encoding it, and ComfyUI's own messages into HTML."""
    for short, shown in templates.SHOWN.items():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .,-]*", shown) and re.fullmatch(r"[a-z0-9_.]+", short)
    assert len({name.lower() for name in templates.SHOWN.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_apart_each_in_a_group(name):
    workflow = ui(name)
    assert workflow["version"] == 0.4
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    assert [pair for pair in combinations(boxes, 2) if not apart(boxes[pair[0]], boxes[pair[1]])] == []
    groups = []
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        groups.append((left, top, left + width, top + height))
    assert all(apart(*pair) for pair in combinations(groups, 2))
    assert [node for node, its in boxes.items() if sum(inside(its, group) for group in groups) != 1] == []
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert len(notes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_links_run_from_left_to_right(name):
    """Or down a column: a link never ends left of where its node begins."""
    workflow = ui(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["links"]
    for _, source, _, target, _, _ in workflow["links"]:
        assert nodes[source]["pos"][0] <= nodes[target]["pos"][0], (source, target)


def files_of(workflow) -> dict:
    """The address of each file that a workflow in UI format asks for, by its place in ComfyUI's models."""
    models = [model for node in workflow["nodes"] for model in node["properties"].get("models", ())]
    return {f"{model['directory']}/{model['name']}": model["url"] for model in models}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_its_address(name):
    """In the nodes, for ComfyUI's page, and in the note."""
    workflow = ui(name)
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    values = [value for node in api(name).values() for value in node["inputs"].values()]
    wanted = {value for value in values if str(value).endswith(".safetensors")}
    assert {Path(place).name for place in files_of(workflow)} == wanted
    assert all(url in note for url in files_of(workflow).values())


@pytest.mark.parametrize("name", NAMES)
def test_the_queue_finds_what_it_edits(name):
    graph = api(name)
    assert queued.require(graph, queued.PROMPT) == [("5", "text")]
    if "hunyuan_video" not in name:
        assert queued.require_negative(graph) == [("6", "text")]
    else:  # guidance is embedded
        with pytest.raises(QueueError, match="negative prompt"):
            queued.require_negative(graph)
    two = graph["8"]["class_type"] == "KSamplerAdvanced"
    seeds = [("8", "noise_seed"), ("16", "noise_seed")] if two else [("8", "seed")]
    assert queued.require(graph, queued.SEED) == seeds
    if "image_to_video" in name:
        assert queued.require_image(graph) == [("12", "image")]


def text_of(comfyui, path) -> bytes:
    with urllib.request.urlopen(f"{comfyui.url}{path}", timeout=30) as answer:
        return answer.read()


def test_templates_are_served_in_order_with_pictures(comfyui):
    listed = comfyui.get("/workflow_templates")["ascend-video"]
    assert listed == sorted(set(templates.SHOWN.values())) == comfyui.get("/api/workflow_templates")["ascend-video"]
    assert [name for name in listed if "no download" in name] == listed[:2]
    for name in NAMES:
        address = f"/api/workflow_templates/ascend-video/{urllib.parse.quote(templates.SHOWN[name])}"
        assert json.loads(text_of(comfyui, f"{address}.json")) == ui(name)
        picture = Image.open(io.BytesIO(text_of(comfyui, f"{address}.jpg")))
        assert picture.format == "JPEG" and picture.width >= 600 and picture.height >= 300, name


@pytest.mark.parametrize("form", ["{short}", "{short}.json", "workflows/{short}.json", "{shown}", "{shown}.json"])
def test_the_queue_knows_both_names(form, tmp_path, monkeypatch):
    """Also in a folder that does not have the file. A replaced workflow has only its short name."""
    monkeypatch.chdir(tmp_path)
    for name in templates.SHOWN if "{short}" in form else NAMES:
        path = Path(form.format(short=name, shown=templates.SHOWN[name]))
        assert queued.read(path, address.of_host("127.0.0.1", 1)) == api(name)
    with pytest.raises(QueueError, match="no_template"):
        queued.read(Path("no_template.json"), address.of_host("127.0.0.1", 1))


@needs_chromium
def test_links_by_the_short_name_open_the_workflow(comfyui):
    """As links by the files' former names do."""
    with ComfyBrowser(comfyui) as browser:
        for name in ("tiny_wan_text_to_video", "hunyuan_video_text_to_video"):
            browser.page.goto(f"{comfyui.url}/?template={name}&source=ascend-video")
            number = len(ui(name)["nodes"])
            browser.page.wait_for_function(f"window.app?.graph?.nodes.length === {number}")
            title = browser.page.evaluate("app.graph.serialize().groups.map(group => group.title)")
            assert title == [group["title"] for group in ui(name)["groups"]]


@needs_chromium
def test_template_browser_shows_the_workflows(comfyui):
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    with ComfyBrowser(comfyui, size=(1600, 2400)) as browser:  # it loads the pictures that are in view
        page = browser.page
        page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.get_by_text("ascend-video", exact=True).first.click()
        page.wait_for_function("""names => {
            const loaded = [...document.querySelectorAll('img')].filter(image => image.naturalWidth)
            return names.every(name => loaded.some(image => image.alt === name))
        }""", arg=list(templates.SHOWN.values()))
        page.wait_for_timeout(500)
        page.screenshot(path=ARTEFACTS / "templates.png")


@pytest.fixture(scope="module")
def browser(comfyui):
    """One page for the tests from here on; there is only one at a time."""
    with ComfyBrowser(comfyui) as browser:
        yield browser


@needs_chromium
def test_page_makes_the_api_format_of_the_ui_format(browser):
    """Opened in ComfyUI's own page, either format becomes the prompt that the API format is."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    errors = []
    browser.page.on("pageerror", lambda error: errors.append(str(error)))
    for name in NAMES:
        browser.open(ui(name))
        assert as_saved(browser.prompt(), api(name)) == without_titles(api(name)), name
        assert own_titles(browser.prompt()) == own_titles(api(name)), name
        browser.page.screenshot(path=ARTEFACTS / f"{name}.png")
        browser.open(api(name))
        assert as_saved(browser.prompt(), api(name)) == without_titles(api(name)), name
    assert errors == []


@needs_chromium
def test_a_workflow_saved_before_an_input_was_added_gets_its_default(browser):
    """The UI format has a node's values by their order: those of inputs that came later are missing at the end."""
    workflow = ui("tiny_wan_text_to_video")
    later = ("attention", "heads_per_call", "warm_up", "quantization")
    node = next(node for node in workflow["nodes"] if node["type"] == "AscendLoadDiffusionModel")
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] not in later]
    node["widgets_values"] = node["widgets_values"][: -len(later)]
    browser.open(workflow)
    expected = api("tiny_wan_text_to_video")
    assert as_saved(browser.prompt(), expected) == without_titles(expected)


@needs_chromium
def test_page_says_which_files_are_missing(browser):
    """As it does for its own templates, with buttons to download them or copy their addresses."""
    text = json.dumps(ui("wan2.2_i2v_a14b_image_to_video"))
    workflow = json.loads(text.replace(".safetensors", "_of_nobody.safetensors"))
    browser.page.evaluate(f"app.extensionManager.setting.set('{MISSING_MODELS}', true)")
    browser.open(workflow)
    places = [place.split("/") for place in files_of(workflow)]
    dialog, panel = browser.page.get_by_text(" / ".join(places[0])), browser.page.get_by_text("View details")
    dialog.or_(panel).wait_for()
    if panel.is_visible():
        panel.click()
    browser.page.wait_for_function("""places => {
        const text = document.body.innerText
        const forms = ([folder, file]) => [`${folder} / ${file}`, `${file}\\n${folder}\\n`]
        return places.every(place => forms(place).some(form => text.includes(form))) && text.includes('Download')
    }""", arg=places)


@needs_chromium
@pytest.mark.parametrize("name", SHOWING_ALL_NODES)
def test_nodes_lie_apart_in_nodes_2(browser, comfyui, name):
    """Where ComfyUI's page draws them taller, those with a picture too."""
    Image.new("RGB", (80, 80)).save(comfyui.base / "input" / "example.png")
    workflow = ui(name)
    left, top, right, bottom = zip(*map(box, workflow["nodes"]))
    whole = min(left), min(top), max(right) - min(left), max(bottom) - min(top)
    browser.page.evaluate(f"app.extensionManager.setting.set('{NODES_2}', true)")
    try:
        browser.open(workflow)
        browser.show(whole)
        boxes = browser.boxes()
    finally:
        browser.page.evaluate(f"app.extensionManager.setting.set('{NODES_2}', false)")
    assert set(boxes) == {node["id"] for node in workflow["nodes"]}
    assert [pair for pair in combinations(boxes, 2) if not apart(boxes[pair[0]], boxes[pair[1]])] == []
