"""What users read at every node: names, tooltips and help, in English and Chinese."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from ascend_runtime.commands import templates
from scripts.lib.comfy_browser import ComfyBrowser, chromium
from make_node_texts import node_definitions, with_lists

REPOSITORY = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh")
HEADINGS = {"en": ("## Inputs", "## Outputs", "## Hints", "## Example"),
            "zh": ("## 输入", "## 输出", "## 提示", "## 示例")}
CATEGORIES = {f"Ascend/{name}" for name in ("loaders", "conditioning", "sampling", "acceleration", "tools")}
MAX_REQUIRED = 4
KEEPS_TRANSLATIONS = (1, 34, 8)  # of ComfyUI's page
WORKFLOW = templates.shown_file("wan2.2_t2v_a14b_text_to_video")
SAMPLER = "app.graph.nodes.find(node => node.type === 'AscendSampler')"
ARTEFACTS = REPOSITORY / ".cache" / "artefacts"
CHINESE = re.compile("[\u4e00-\u9fff]")

needs_chromium = pytest.mark.skipif(
    not chromium(), reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"
)


@pytest.fixture(scope="module")
def nodes(comfyui) -> dict:
    """Our nodes as GET /object_info describes them."""
    ours = {name: node for name, node in comfyui.get("/object_info").items() if name.startswith("Ascend")}
    assert len(ours) >= 25
    return ours


@pytest.fixture(scope="module")
def translations(comfyui) -> dict:
    return comfyui.get("/i18n")


def keys(tree) -> set:
    return {(key, *more) for key, value in tree.items() for more in (keys(value) if isinstance(value, dict) else [()])}


def leaves(tree) -> list:
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_every_input_and_output_has_a_tooltip(nodes):
    for name, node in nodes.items():
        assert node["category"] in CATEGORIES and node["description"], name
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        without = [key for key, (_, options) in inputs.items() if not options.get("tooltip")]
        assert without == [] and all(node["output_tooltips"]), name


def test_few_inputs_are_required(nodes):
    required = {name: len(node["input"].get("required", {})) for name, node in nodes.items()}
    del required["AscendSampler"], required["AscendSamplerAdvanced"]  # as core's
    assert max(required.values()) <= MAX_REQUIRED, required


def test_english_names_are_those_of_the_schemas(nodes, translations):
    assert translations["en"]["nodeDefs"] == node_definitions(nodes), "run scripts/make_node_texts.py"


def test_chinese_has_the_keys_of_english(translations):
    assert keys(translations["zh"]) == keys(translations["en"])
    texts = leaves(translations["zh"])
    assert all(text.strip() for text in texts)
    tooltips = [path for path in keys(translations["zh"]) if path[-1] in ("tooltip", "description", "display_name")]
    assert tooltips
    for path in tooltips:
        text = translations["zh"]
        for key in path:
            text = text[key]
        assert CHINESE.search(text), f"{path}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(comfyui, nodes, translations, language):
    for name, node in nodes.items():
        url = f"{comfyui.url}/extensions/ascend-video/docs/{name}/{language}.md"
        with urllib.request.urlopen(url, timeout=30) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {translations[language]['nodeDefs'][name]['display_name']}\n"), url
        assert [heading for heading in HEADINGS[language] if f"\n{heading}\n" not in page] == [], url
        texts = translations[language]["nodeDefs"][name]
        assert page == with_lists(page, node, texts, language), f"{url}: run scripts/make_node_texts.py"


def test_no_help_page_without_a_node(nodes):
    assert {folder.name for folder in (REPOSITORY / "web" / "docs").iterdir()} == set(nodes)


@pytest.fixture(scope="module")
def chinese(comfyui):
    """A page whose interface is in Chinese, with a workflow."""
    with ComfyBrowser(comfyui, locale="zh") as browser:
        browser.open(json.loads(WORKFLOW.read_text()))
        yield browser


@needs_chromium
def test_page_shows_chinese_help(chinese):
    """A node's info button opens its Chinese help page."""
    # Newer pages say over the button that the workflow's models are missing.
    chinese.page.add_style_tag(content="[data-testid=error-overlay] { display: none }")
    # A workflow that the page is still laying out takes the selection away again.
    chinese.page.wait_for_function(f"""() => {{
        if (document.querySelector('[data-testid=info-button]')) return true
        app.canvas.selectNode({SAMPLER})
    }}""", polling=500)
    chinese.page.get_by_test_id("info-button").click()
    chinese.page.get_by_role("heading", name="官方设置").wait_for()
    screenshot(chinese, "help_zh")


@needs_chromium
def test_page_shows_chinese_names(chinese, translations):
    """A node on the canvas has its Chinese names."""
    expected = translations["zh"]["nodeDefs"]["AscendSampler"]
    version = chinese.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    if tuple(map(int, version.split(".")[:3])) < KEEPS_TRANSLATIONS:
        pytest.skip(f"ComfyUI's page {version} forgets the translations of every pack when it loads a language "
                    "(mended by Comfy-Org/ComfyUI_frontend#7214)")
    node = chinese.page.evaluate(f"""() => {{
        const node = {SAMPLER}
        return {{title: node.title, category: node.constructor.category,
                 inputs: node.inputs.map(input => [input.name, input.localized_name]),
                 outputs: node.outputs.map(output => output.localized_name)}}
    }}""")
    screenshot(chinese, "graph_zh")
    assert (node["title"], node["category"]) == (expected["display_name"], "昇腾/采样")
    names = {key: texts["name"] for key, texts in expected["inputs"].items() if key != "control_after_generate"}
    assert dict(node["inputs"]) == names
    assert node["outputs"] == [expected["outputs"]["0"]["name"]]


def screenshot(browser, name):
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    browser.page.screenshot(path=ARTEFACTS / f"{name}.png")
