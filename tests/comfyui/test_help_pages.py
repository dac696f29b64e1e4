"""The nodes' help pages fit ComfyUI's side bar, and name nodes as the page does in their language."""

import json
import re
from pathlib import Path

import pytest
from scripts.lib.comfy_browser import ComfyBrowser, chromium

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "web" / "docs"
ARTEFACTS = REPOSITORY / ".cache" / "artefacts"
LANGUAGES = ("en", "zh")
NODES = sorted(folder.name for folder in DOCS.iterdir())
SAMPLE = ("AscendSampler", "AscendLoadLora")  # of the longest pages
WIDEST_WORD = 26  # characters; the side bar is 306 pixels wide at first
CHINESE = re.compile("[\u4e00-\u9fff]")
TYPES = "Object.fromEntries(Object.entries(LiteGraph.registered_node_types).map(([name, type]) => [name, type.title]))"
ADD = """type => {
    app.graph.clear()
    const node = LiteGraph.createNode(type)
    node.pos = [500, 300]
    app.graph.add(node)
    app.canvas.deselectAll()
    app.canvas.selectNode(node)
}"""
# The width of the page's text, and of what is in it.
WIDTHS = """title => {
    const shown = [...document.querySelectorAll('h1')].find(head => head.offsetParent && head.textContent === title)
    if (!shown) return null
    const text = shown.parentElement, right = text.getBoundingClientRect().right
    const wide = [...text.querySelectorAll('*')].filter(one => one.getBoundingClientRect().right > right + 1)
    return [text.clientWidth, text.scrollWidth, wide.map(one => one.textContent.slice(0, 60))]
}"""

needs_chromium = pytest.mark.skipif(
    not chromium(), reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"
)


def page(name, language) -> str:
    return (DOCS / name / f"{language}.md").read_text()


def display_names(language) -> dict:
    texts = json.loads((REPOSITORY / "locales" / language / "nodeDefs.json").read_text())
    return {name: node["display_name"] for name, node in texts.items()}


def unbroken(text) -> list:
    """The words that a page cannot break into lines, and that are too long."""
    words = re.findall(r"[\w.<>/-]+", re.sub(r"\]\([^)]*\)|</?code>", "]", text), re.ASCII)
    parts = [part for word in words for part in re.split(r"(?<=[-/])|<wbr>|<br>", word)]
    return [part for part in parts if len(part) > WIDEST_WORD]


def test_long_words_are_seen():
    text = f"[a](https://{'z' * 40}) `lora_transformer_blocks_0_to_q` umt5_xxl_fp8_<wbr>scaled <code>a_<wbr>b</code>"
    assert unbroken(text) == ["lora_transformer_blocks_0_to_q"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_have_nothing_wide(language):
    for name in NODES:
        text = page(name, language)
        assert not re.search(r"^\||^```|^ {4,}\S", text, re.MULTILINE), f"{name}: a table or a block of code"
        assert unbroken(text) == [], name


@pytest.fixture(scope="module", params=LANGUAGES)
def opened(comfyui, request):
    """(language, a page of ComfyUI in it)."""
    with ComfyBrowser(comfyui, locale=request.param) as browser:
        browser.page.add_style_tag(content="[data-testid=error-overlay] { display: none }")
        yield request.param, browser


@needs_chromium
def test_help_fits_the_side_bar(opened, request):
    language, browser = opened
    names, wide = display_names(language), {}
    for name in NODES if request.config.getoption("--all-pages") else SAMPLE:
        browser.page.evaluate(ADD, name)
        browser.page.get_by_test_id("info-button").click()
        widths = browser.page.wait_for_function(WIDTHS, arg=names[name]).json_value()
        browser.page.screenshot(path=screenshot(f"help_{name}_{language}"))
        if widths[1] > widths[0] + 1 or widths[2]:
            wide[name] = widths
    assert wide == {}


@needs_chromium
def test_pages_name_nodes_as_comfyui_does(opened):
    """Ours by their names, not their ids; in Chinese, core's nodes by the names that ComfyUI's page gives them."""
    language, browser = opened
    ours, titles = display_names(language), browser.page.evaluate(TYPES)
    for name in NODES:
        text = re.sub("`[^`\n]+`", "", page(name, language))
        ids = [one for one in ours if re.search(rf"\b{one}\b", text)]
        assert ids == [], f"{name}: ids of nodes"
        if language == "zh":
            english = [one for one in display_names("en").values() if one in text and one not in ours.values()]
            known = {one: title for one, title in titles.items() if CHINESE.search(title) and one not in ours}
            words = set(re.findall(r"(?<![\w（])[A-Za-z]\w{7,}(?![\w）])", text))
            assert english == [] and {one: known[one] for one in words & set(known)} == {}, name


def screenshot(name) -> Path:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    return ARTEFACTS / f"{name}.png"
