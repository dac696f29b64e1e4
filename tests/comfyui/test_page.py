"""How nodes look and are found in ComfyUI's page, in a real browser: on the classic canvas and in Nodes 2.0."""

import re

import comfy_graphs as graphs
import pytest
from scripts.lib.comfy_browser import NODES_2, ComfyBrowser, chromium

MODES = {"classic": False, "nodes_2": True}
TWINS = {  # core's node that does the same; others may show MOST widgets
    "AscendSampler": "KSampler",
    "AscendSamplerAdvanced": "KSamplerAdvanced",
    "AscendLoadDiffusionModel": "UNETLoader",
    "AscendLoadTextEncoder": "CLIPLoader",
    "AscendLoadVAE": "VAELoader",
    "AscendLoadLora": "LoraLoaderModelOnly",
    "AscendTextEncode": "CLIPTextEncode",
    "AscendImageToVideo": "WanImageToVideo",
    "AscendVideoSize": "EmptyHunyuanLatentVideo",
    "AscendVAEDecode": "VAEDecode",
    "AscendVAEEncode": "VAEEncode",
    "AscendUNETLoader": "UNETLoader",
    "AscendCLIPLoader": "CLIPLoader",
    "AscendDualCLIPLoader": "DualCLIPLoader",
    "AscendVAELoader": "VAELoader",
    "AscendCheckpointLoaderSimple": "CheckpointLoaderSimple",
}
MOST = 5
PURPOSES = {  # what a user may type who looks for the node
    "AscendSampler": ("wan", "hunyuan", "text to video", "ksampler", "multi gpu", "npu", "采样器"),
    "AscendSamplerAdvanced": ("ksampler advanced", "leftover noise", "wan"),
    "AscendLoadDiffusionModel": ("wan", "load model", "unet loader", "image to video", "加载模型"),
    "AscendLoadTextEncoder": ("umt5", "clip loader", "text encoder", "文本编码器"),
    "AscendLoadVAE": ("vae loader", "load vae", "wan"),
    "AscendLoadLora": ("lora", "lightx2v", "lycoris"),
    "AscendFewStepLora": ("4 steps", "lightning", "lightx2v"),
    "AscendTextEncode": ("prompt", "clip text encode", "text to video", "提示词"),
    "AscendImageToVideo": ("image to video", "start image", "last frame", "图生视频"),
    "AscendVideoSize": ("seconds", "empty latent", "text to video"),
    "AscendVAEDecode": ("vae decode", "wan", "npu"),
    "AscendVAEEncode": ("vae encode", "image to latent", "wan"),
    "AscendParallelConfig": ("multi gpu", "npu", "ulysses", "fsdp", "多卡"),
    "AscendFreeMemory": ("unload", "free memory", "vram", "释放显存"),
    "AscendProfiler": ("profile", "tensorboard", "performance"),
    "AscendStepCache": ("teacache", "magcache", "fbcache", "speed up"),
    "AscendAttentionCache": ("attention cache", "mindie", "acceleration"),
    "AscendBlockCache": ("block skip", "dit cache", "acceleration"),
    "AscendRainFusion": ("sparse attention", "radial attention", "acceleration", "稀疏注意力"),
    "AscendApplyAcceleration": ("teacache", "sparse attention", "speed up"),
    "AscendUNETLoader": ("unet loader", "wan", "multi gpu"),
    "AscendCLIPLoader": ("clip loader", "umt5", "wan"),
    "AscendDualCLIPLoader": ("dual clip", "hunyuan", "llama"),
    "AscendVAELoader": ("vae loader", "load vae", "wan"),
    "AscendCheckpointLoaderSimple": ("checkpoint loader", "all in one", "wan"),
}
FOUND = 64  # as many as the page's search shows
CHINESE = re.compile("[\u4e00-\u9fff]")

pytestmark = pytest.mark.skipif(not chromium(), reason="no chromium in PATH; `apt-get install chromium` brings it")

# Puts bare nodes of these types on an empty canvas, far from each other; {type: id}.
ADD = """async types => {
    app.graph.clear()
    const made = types.map((type, index) => {
        const node = LiteGraph.createNode(type)
        node.pos = [index % 6 * 600, Math.floor(index / 6) * 600]
        app.graph.add(node)
        return [type, node.id]
    })
    app.canvas.ds.scale = 0.2 // all of them are drawn
    app.canvas.ds.offset = [200, 200]
    return Object.fromEntries(made)
}"""
# [name, what is shown as its value] of each widget that a node shows, without buttons, by the node's id.
SHOWN = """async () => {
    const word = row => {
        const input = row.querySelector('input')
        const laid = input && getComputedStyle(input.parentElement, '::after').content
        if (laid && !['none', 'normal'].includes(laid)) return laid.slice(1, -1)
        const toggle = row.querySelector('.p-toggleswitch')
        if (toggle) return getComputedStyle(toggle, '::before').content.slice(1, -1)
        return row.querySelector('[aria-checked=true], [data-state=on]')?.textContent.trim() ?? input?.value ?? ''
    }
    const inPage = node => {
        const rows = [...document.querySelectorAll(`[data-node-id="${node.id}"] .lg-node-widget`)]
        const label = row => row.querySelector('p, [data-testid=widget-layout-field-label]')?.textContent.trim() ?? ''
        return rows.map(row => [label(row), word(row), row])
            .filter(([, , row]) => !row.matches(':has(> * > button:only-child), :has(.p-button-label)'))
            .map(([name, text]) => [name, text])
    }
    const onCanvas = node => (node.widgets ?? []).filter(w => w.type !== 'button' && node.isWidgetVisible(w)).map(
        w => [w.name, typeof w.value === 'boolean' ? w.options[w.value ? 'on' : 'off'] ?? ''
            : `${w._displayValue ?? w.value}`])
    const shown = LiteGraph.vueNodesMode ? inPage : onCanvas
    const all = () => Object.fromEntries(app.graph.nodes.map(node => [node.id, shown(node)]))
    for (let now = '', rests = 0; rests < 2; ) { // looks in a row, as a busy machine draws late
        await new Promise(done => setTimeout(done, 80))
        const before = now
        now = JSON.stringify(all())
        rests = now === before ? rests + 1 : 0
    }
    return all()
}"""
FIND = """([words, most]) => {
    const {$pinia} = document.querySelector('#vue-app').__vue_app__.config.globalProperties
    const {nodeSearchService} = $pinia._s.get('nodeDef')
    return Object.fromEntries(words.map(word =>
        [word, nodeSearchService.searchNode(word, [], {limit: most}).map(({name}) => name)]))
}"""
TEXTS = """async () => {
    const {TEXTS} = await import('/extensions/ascend-video/texts.js')
    const said = text => typeof text === 'function' ? `${text(2, 'MODEL')}` : text
    return Object.fromEntries(Object.entries(TEXTS).map(([language, modules]) => [language, Object.fromEntries(
        Object.entries(modules).flatMap(([module, texts]) =>
            Object.entries(texts).map(([key, text]) => [`${module}.${key}`, said(text)])))]))
}"""


@pytest.fixture(scope="module")
def nodes(comfyui) -> dict:
    return {name: node for name, node in comfyui.get("/object_info").items() if name.startswith("Ascend")}


@pytest.fixture(scope="module")
def pages(comfyui):
    """`pages(mode)`: ComfyUI's page in that of MODES; it stays open."""
    with ComfyBrowser(comfyui) as browser:
        now = [None]

        def page(mode: str) -> ComfyBrowser:
            if now != [mode]:
                comfyui.post(f"/settings/{NODES_2}", MODES[mode])
                browser.reload()
                now[:] = [mode]
            return browser

        yield page
        comfyui.post(f"/settings/{NODES_2}", False)


def inputs_of(node: dict) -> dict:
    return node["input"].get("required", {}) | node["input"].get("optional", {})


@pytest.mark.parametrize("mode", MODES)
def test_a_bare_node_shows_few_widgets_and_no_number_that_means_automatic(pages, nodes, mode):
    page = pages(mode).page
    cores = sorted(set(TWINS.values()))
    ids = page.evaluate(ADD, [*nodes, *cores])
    shown = page.evaluate(SHOWN)
    count = {name: len(shown[str(number)]) for name, number in ids.items()}
    assert count["KSampler"] >= 6, "the page's widgets are not found"
    for name, node in nodes.items():
        most = count[TWINS[name]] if name in TWINS else MOST
        assert count[name] <= most, (name, shown[str(ids[name])])
        words = {key: more["shown_as"]["word"] for key, (_, more) in inputs_of(node).items() if "shown_as" in more}
        for widget, text in shown[str(ids[name])]:
            assert text == words.get(widget, text), (name, widget)
    sampler = dict(shown[str(ids["AscendSampler"])])
    assert [sampler[name] for name in ("steps", "cfg", "shift")] == ["auto"] * 3


def names(page, node: int) -> list[str]:
    return [name for name, _ in page.evaluate(SHOWN)[str(node)]]


def change(page, node: int, widget: str, value) -> None:
    """As a user does."""
    page.evaluate("""([id, name, value]) => {
        const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name)
        widget.value = value
        widget.callback?.(value)
    }""", [node, widget, value])


def toggle(page, node: int) -> None:
    page.evaluate("""id => {
        const node = app.graph.getNodeById(id)
        node.showAdvanced = !node.showAdvanced
    }""", node)


@pytest.mark.parametrize("mode", MODES)
def test_further_widgets_are_shown_on_request(pages, mode, request):
    """Advanced ones at the node's button; those of an accelerator with preset custom. What was changed stays."""
    if mode != "classic" and not request.config.getoption("--all-pages"):
        pytest.skip("--all-pages")
    page = pages(mode).page
    ids = page.evaluate(ADD, ["AscendLoadVAE", "AscendStepCache"])
    loader, cache = ids.values()
    few = names(page, loader)
    height = page.evaluate("id => app.graph.getNodeById(id).size[1]", loader)
    toggle(page, loader)
    assert names(page, loader) == [*few, "dtype", "tiles"]
    change(page, loader, "dtype", "float32")
    toggle(page, loader)
    assert names(page, loader) == [*few, "dtype"]
    assert names(page, cache) == ["preset", "method"]
    change(page, cache, "preset", "custom")
    assert names(page, cache) == ["preset", "method", "threshold", "first_steps", "last_steps", "most", "interval",
                                  "order"]
    change(page, cache, "preset", "fast")
    assert names(page, cache) == ["preset", "method"]
    if mode == "classic":
        change(page, loader, "dtype", "auto")
        toggle(page, loader)
        toggle(page, loader)
        assert page.evaluate("id => app.graph.getNodeById(id).size[1]", loader) == height


def test_values_stay_numbers_and_inputs_take_links(pages):
    """In the saved workflow, in the prompt, and after it is loaded again; a linked advanced input is shown."""
    browser = pages("classic")
    ids = browser.page.evaluate(ADD, ["AscendSampler", "PrimitiveInt", "PrimitiveFloat", "AscendParallelConfig"])
    sampler, count, fraction, parallel = ids.values()
    assert "cfg_low_noise" not in names(browser.page, sampler)
    browser.page.evaluate("""([sampler, count, fraction]) => {
        const node = app.graph.getNodeById(sampler)
        const place = name => node.inputs.findIndex(input => input.name === name)
        app.graph.getNodeById(count).connect(0, node, place('steps'))
        app.graph.getNodeById(fraction).connect(0, node, place('cfg_low_noise'))
    }""", [sampler, count, fraction])
    assert "cfg_low_noise" in names(browser.page, sampler)
    saved = browser.graph()
    browser.open(saved)
    assert "cfg_low_noise" in names(browser.page, sampler)
    values = {node["id"]: node.get("widgets_values") for node in saved["nodes"]}
    assert {node["id"]: node.get("widgets_values") for node in browser.graph()["nodes"]} == values
    assert values[parallel] == [0, 0, 0, "auto", 0, 1, False, "rotate", False, "this machine"]
    prompt = browser.prompt()
    inputs = prompt[str(sampler)]["inputs"]
    assert (inputs["steps"], inputs["cfg_low_noise"]) == ([str(count), 0], [str(fraction), 0])
    assert (inputs["cfg"], inputs["shift"]) == (0, 0)
    assert set(prompt[str(parallel)]["inputs"]) >= {"ranks", "fsdp", "overlap"}


def test_links_of_numbers_are_accepted(comfyui):
    """By the server, without the page."""
    graph = graphs.latent(steps=["91", 0])
    graph["91"] = {"class_type": "PrimitiveInt", "inputs": {"value": 2}}
    assert graphs.saved_latent(comfyui, comfyui.queue(graph)).std() > 0


def test_every_node_is_found_by_three_purposes(pages, nodes):
    assert PURPOSES.keys() == nodes.keys()
    words = sorted({word for purposes in PURPOSES.values() for word in purposes})
    found = pages("classic").page.evaluate(FIND, [words, FOUND])
    for name, purposes in PURPOSES.items():
        assert len(purposes) >= 3
        assert [word for word in purposes if name not in found[word]] == [], name
        node = nodes[name]
        assert node["search_aliases"] and len(set(node["search_aliases"])) == len(node["search_aliases"]), name


def test_every_text_of_the_page_is_in_both_languages(pages, nodes):
    texts = pages("classic").page.evaluate(TEXTS)
    assert texts["en"].keys() == texts["zh"].keys() and len(texts["en"]) > 10
    assert all(text.strip() and not CHINESE.search(text) for text in texts["en"].values())
    assert {key for key, text in texts["zh"].items() if not CHINESE.search(text)} == set()
    words = {more["shown_as"]["word"] for node in nodes.values() for _, more in inputs_of(node).values()
             if "shown_as" in more}
    assert {f"widgets.{word}" for word in words} <= texts["en"].keys()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_sockets_of_our_types_have_colours_of_their_own(pages, theme):
    colours = pages("classic").page.evaluate("""async theme => {
        await app.extensionManager.setting.set('Comfy.ColorPalette', theme)
        await new Promise(done => setTimeout(done, 300))
        const {default_connection_color_byType: colours} = app.canvas
        const inPage = type => getComputedStyle(document.body).getPropertyValue(`--color-datatype-${type}`).trim()
        const all = Object.keys(colours).map(type => [type, colours[type], inPage(type)])
        await app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')
        return all
    }""", theme)
    rgb = {type_: [int(colour[at : at + 2], 16) for at in (1, 3, 5)] for type_, colour, _ in colours if colour}
    ours = {type_ for type_ in rgb if type_.startswith("ASCEND_")}
    assert len(ours) == 6 and {"MODEL", "VAE", "CLIP", "LATENT"} <= rgb.keys()
    assert all(colour == in_page for type_, colour, in_page in colours if type_ in ours)
    for one in ours:
        near = {other for other in rgb.keys() - {one} if sum(abs(a - b) for a, b in zip(rgb[one], rgb[other])) < 60}
        assert not near, one


DRAG = """([from, to]) => {
    const node = type => app.graph.nodes.find(n => n.type === type)
    const view = app.canvas.canvas.getBoundingClientRect()
    const {scale, offset} = app.canvas.ds
    const inPage = ([x, y]) => [(x + offset[0]) * scale + view.x, (y + offset[1]) * scale + view.y]
    const place = node(to).inputs.findIndex(({type}) => ['VAE', 'ASCEND_MODEL'].includes(type))
    return [inPage(node(from).getConnectionPos(false, 0)), inPage(node(to).getConnectionPos(true, place))]
}"""


@pytest.mark.parametrize("source, target, says", [
    ("AscendLoadVAE", "VAEDecode", "Use Ascend VAE Decode here"),
    ("UNETLoader", "AscendSampler", "It takes the output of Ascend Load Diffusion Model"),
])  # fmt: skip
def test_a_refused_link_says_what_to_do(pages, source, target, says):
    page = pages("classic").page
    page.evaluate(ADD, [source, target])
    page.evaluate("app.canvas.ds.scale = 1, app.canvas.draw(true, true)")
    start, end = page.evaluate(DRAG, [source, target])
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 20, start[1] + 20, steps=3)
    page.mouse.move(*end, steps=5)
    page.mouse.up()
    page.get_by_text(says).wait_for(timeout=10_000)
    page.keyboard.press("Escape")
    assert page.evaluate("app.graph.links.size ?? Object.keys(app.graph.links).length") == 0
