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
from scripts.lib.comfy_browser import MISSING_MODELS, ComfyBrowser, chromium
from PIL import Image
from shipped_workflows import NAMES, WORKFLOWS, api, ui

REPOSITORY = Path(__file__).resolve().parents[2]
ARTEFACTS = REPOSITORY / ".cache" / "artefacts"
SAMPLE = [  # without --all-pages: pictures, both kinds of samplers, an accelerator, the switch
    "hunyuan_video_v1_image_to_video",
    "stock_wan2.2_i2v_a14b_image_to_video",
    "tiny_wan_text_to_video",
    "wan2.1_flf2v_14b_first_last_frame_to_video",
    "wan2.2_t2v_a14b_text_to_video_fast",
]
SUBGRAPHS = REPOSITORY / "subgraphs"
CHINESE = re.compile("[\u4e00-\u9fff]")
TITLE_HEIGHT = 30  # of a node, above its position
NOTES = ("MarkdownNote", "Note")  # of the page alone: the API format has none

needs_chromium = pytest.mark.skipif(
    not chromium(), reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"
)


def pytest_generate_tests(metafunc):
    if "opened" in metafunc.fixturenames:
        metafunc.parametrize("opened", NAMES if metafunc.config.getoption("--all-pages") else SAMPLE)


def without_titles(prompt) -> dict:
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def as_saved(prompt, saved) -> dict:
    """A page's prompt, without inputs that core nodes of newer ComfyUIs have and the `saved` prompt has not. The choice
    of this machine is left out too, as clusters belong to a host."""
    prompt = without_titles(prompt)
    for number, node in prompt.items():
        if node["class_type"] == "AscendParallelConfig" and node["inputs"].get("cluster") == "this machine":
            del node["inputs"]["cluster"]
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
def test_titles_are_in_both_languages(name):
    """A page translates a node's own title; titles that a workflow gives it, and those of groups, it does not."""
    workflow = ui(name)
    given = [node["title"] for node in workflow["nodes"] if " / " in node.get("title", "")]
    groups = [group["title"] for group in workflow["groups"]]
    assert len(given) >= 2 and len(groups) >= 4
    for title in given + groups:
        english, chinese = title.split(" / ")
        assert re.search("[A-Za-z]{3}", english) and not CHINESE.search(english) and CHINESE.search(chinese), title
    known = json.loads((REPOSITORY / "locales" / "en" / "nodeDefs.json").read_text())
    others = {node["type"]: node["title"] for node in workflow["nodes"] if node.get("title") not in (None, *given)}
    assert all(kind not in known or known[kind]["display_name"] == title for kind, title in others.items()), others


@pytest.mark.parametrize("name", NAMES)
def test_notes_say_what_a_video_is_predicted_to_take(name):
    (note,) = [node["widgets_values"][0] for node in ui(name)["nodes"] if node["type"] in NOTES]
    assert CHINESE.search(note) and templates.SHOWN[name] in note
    predicted = "predicted, not measured" in note
    assert predicted == ("safetensors" in note and not name.startswith("stock"))
    if predicted:
        rows = re.findall(r"^\| (\d+) x (\d+), [\d.]+ s, (\d+) steps / 步 \| (.*) \|$", note, re.M)
        assert rows and all(re.fullmatch(r"(.*\d m?i?n?s?.*, \d+ GB|does not fit.*)", cell)
                            for row in rows for cell in row[3].split(" | ")), rows  # fmt: skip
        (size,) = [node["inputs"] for node in api(name).values() if node["class_type"] == "AscendVideoSize"]
        assert (str(size["width"]), str(size["height"])) in {row[:2] for row in rows}


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
        }""", arg=sorted(set(templates.SHOWN.values())))
        page.wait_for_timeout(500)
        page.screenshot(path=ARTEFACTS / "templates.png")


@pytest.fixture(scope="module")
def browser(comfyui):
    """One page for the tests from here on; there is only one at a time."""
    with ComfyBrowser(comfyui) as browser:
        yield browser


@needs_chromium
def test_page_makes_the_api_format_of_the_ui_format(browser, opened):
    """Opened in ComfyUI's own page, either format becomes the prompt that the API format is."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    errors, expected = [], api(opened)

    def note(error):
        errors.append(str(error))

    browser.page.on("pageerror", note)
    try:
        browser.open(ui(opened))
        assert as_saved(browser.prompt(), expected) == without_titles(expected)
        assert own_titles(browser.prompt()) == own_titles(expected)
        browser.page.screenshot(path=ARTEFACTS / f"{opened}.png")
        browser.open(expected)
        assert as_saved(browser.prompt(), expected) == without_titles(expected)
        assert errors == []
    finally:
        browser.page.remove_listener("pageerror", note)


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


def overlaps(boxes) -> list:
    return [pair for pair in combinations(boxes, 2) if not apart(boxes[pair[0]], boxes[pair[1]])]


@needs_chromium
def test_nodes_lie_apart_in_the_page(browser, comfyui, opened):
    """On the canvas, and in Nodes 2.0, where they are taller; those with a picture too."""
    Image.new("RGB", (80, 80)).save(comfyui.base / "input" / "example.png")
    workflow = ui(opened)
    browser.open(workflow)
    assert overlaps({node["id"]: box(node) for node in browser.graph()["nodes"]}) == []
    boxes = browser.boxes_in_nodes_2(workflow)
    assert set(boxes) == {node["id"] for node in workflow["nodes"]}
    assert overlaps(boxes) == []


BLUEPRINTS = {json.loads(file.read_text())["id"]: file for file in sorted(SUBGRAPHS.glob("*.json"))}


@pytest.mark.parametrize("file", BLUEPRINTS.values(), ids=lambda file: file.stem)
def test_a_blueprint_is_sound(file):
    """ComfyUI's page adds it as one node of the type that it defines, whose inputs are linked to those inside."""
    whole = json.loads(file.read_text())
    (definition,), (node,) = whole["definitions"]["subgraphs"], whole["nodes"]
    assert node["type"] == definition["id"] and definition["name"] == file.stem and whole["version"] == 0.4
    inside, links = ({one["id"]: one for one in definition[key]} for key in ("nodes", "links"))
    assert [slot["name"] for slot in node["inputs"]] == [end["name"] for end in definition["inputs"]]
    for number, end in enumerate(definition["inputs"]):
        (link,) = (links[link] for link in end["linkIds"])
        assert (link["origin_id"], link["origin_slot"]) == (definition["inputNode"]["id"], number)
    for link in links.values():
        if link["target_id"] in inside:
            slot = inside[link["target_id"]]["inputs"][link["target_slot"]]
            assert slot["link"] == link["id"] and link["type"] == slot["type"]
        if link["origin_id"] in inside:
            assert link["id"] in inside[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
    used = [slot["link"] for one in inside.values() for slot in one["inputs"] if slot["link"] is not None]
    used += [link for one in definition["outputs"] for link in one["linkIds"]]
    assert sorted(used) == sorted(links)
    for owner, widget in node["properties"]["proxyWidgets"]:
        own = node if owner == "-1" else inside[int(owner)]
        assert widget in [*(slot["name"] for slot in own["inputs"]), "control_after_generate"]


def test_comfyui_lists_the_blueprints(comfyui):
    listed = {entry["name"] for entry in comfyui.get("/global_subgraphs").values()}
    assert {file.stem for file in BLUEPRINTS.values()} <= listed and len(BLUEPRINTS) >= 3


@needs_chromium
def test_a_blueprint_is_queued_as_its_workflow(browser):
    """All of it but what stays outside: loading the image, and saving the video."""
    workflows = {"Ascend Text to Video (Wan 2.2)": "wan2.2_t2v_a14b_text_to_video",
                 "Ascend Image to Video (Wan 2.2)": "wan2.2_i2v_a14b_image_to_video"}  # fmt: skip
    for blueprint, name in workflows.items():
        browser.open(json.loads((SUBGRAPHS / f"{blueprint}.json").read_text()))
        made = {number.partition(":")[2]: node for number, node in browser.prompt().items()}
        for node in made.values():
            for key, value in node["inputs"].items():
                if isinstance(value, list):
                    node["inputs"][key] = [value[0].partition(":")[2], value[1]]
        expected = {number: node for number, node in api(name).items()
                    if node["class_type"] not in ("LoadImage", "SaveVideo")}  # fmt: skip
        expected["7"]["inputs"].pop("start_image", None)
        assert as_saved(made, expected) == without_titles(expected)
