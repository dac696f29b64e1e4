"""What a user of ComfyUI does in its page: opens a template, finds and adds nodes, changes widgets, runs, cancels."""

import base64
import json
import time
from pathlib import Path

from ascend_runtime.commands import templates
from page_scripts import DROP, EMPTY, FIT, REPORTS, TOASTS, VIDEO
from scripts.lib.comfy_browser import NODES_2

LOD = "LiteGraph.Canvas.MinFontSizeForLOD"  # of the page: below this size, the classic canvas draws no text
# By a user's hand: the widget's callback runs, and Nodes 2.0 learn the value.
SET_ONE = """([type, name, value, number]) => {
    const node = app.graph.nodes.filter(n => n.type === type)[number]
    const widget = node.widgets.find(w => w.name === name)
    widget.value = value
    widget.callback?.(value, app.canvas, node)
    app.canvas.setDirty(true, true)
}"""
WIDGETS = """type => app.graph.nodes.find(n => n.type === type).widgets
    .filter(w => !w.hidden && !w.options?.hidden && !['button', 'ascend-report'].includes(w.type)
                 && w.name !== 'control_after_generate')
    .map(w => [w.name, w.value, `${w._displayValue ?? w.value}`])"""
ADD = """([type, x, y]) => {
    const node = LiteGraph.createNode(type)
    node.pos = [x, y]
    app.graph.add(node)
    return node.id
}"""
LINK = """([from, to, name]) => {
    const [source, target] = [app.graph.getNodeById(from), app.graph.getNodeById(to)]
    const input = target.inputs.findIndex(one => one.name === name)
    const output = source.outputs.findIndex(one => one.type === target.inputs[input].type)
    if (!source.connect(output, target, input)) throw new Error(`no link from ${source.type} to ${name}`)
}"""
# playwright's add_style_tag fails if the page is refused a request meanwhile, whatever it is for.
STYLE = "css => { document.head.appendChild(document.createElement('style')).textContent = css }"
ID = "([type, number]) => app.graph.nodes.filter(n => n.type === type)[number].id"
OPTIONS = "[...document.querySelectorAll('[role=option]')].map(e => e.innerText.trim().split(/\\s{2,}|\\n/)[0])"
IDLE = 300.0  # seconds for a small job on a busy machine


class User:
    """browser: a ComfyBrowser. nodes_2: whether the page draws Nodes 2.0. pictures: the folder for pictures."""

    def __init__(self, browser, nodes_2: bool, pictures: Path):
        self.browser, self.page, self.comfyui = browser, browser.page, browser.server
        self.pictures, self.mode = pictures, "nodes2" if nodes_2 else "classic"
        pictures.mkdir(parents=True, exist_ok=True)
        self.setting(NODES_2, nodes_2)
        self.setting(LOD, 0)
        self.setting("Comfy.Minimap.Visible", False)
        browser.reload()
        self.page.evaluate(STYLE, "[data-testid=error-overlay] { display: none }")

    def setting(self, name, value):
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def command(self, name):
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def picture(self, name):
        self.page.screenshot(path=self.pictures / f"{name}_{self.mode}.png")

    def clear(self):
        self.page.keyboard.press("Escape")
        self.page.evaluate("app.graph.clear()")

    def template(self, short):
        self.browser.open(json.loads(templates.shown_file(short).read_text()))
        self.page.wait_for_function("app.graph.nodes.length > 4")
        self.fit()

    def fit(self):
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(400)

    def look_at(self, *types, margin=60):
        """Brings nodes of these types into view."""
        bounds = self.page.evaluate("""types => {
            const boxes = app.graph.nodes.filter(n => types.includes(n.type)).map(n => [...n.pos, ...n.size])
            const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])))
            return [left, top - 40, Math.max(...boxes.map(([x, , w]) => x + w)) - left,
                    Math.max(...boxes.map(([, y, , h]) => y + h)) - top + 60]
        }""", list(types))
        self.browser.show(bounds, margin)

    def add(self, node_type, x=400, y=300) -> int:
        return self.page.evaluate(ADD, [node_type, x, y])

    def has(self, node_type) -> bool:
        return self.page.evaluate("type => app.graph.nodes.some(n => n.type === type)", node_type)

    def node(self, node_type, number=0) -> int:
        return self.page.evaluate(ID, [node_type, number])

    def link(self, source, target, name):
        """From the first output of the input's type."""
        self.page.evaluate(LINK, [source, target, name])

    def set(self, node_type, number=0, **values):
        for name, value in values.items():
            self.page.evaluate(SET_ONE, [node_type, name, value, number])

    def widgets(self, node_type) -> dict:
        """Name -> (value, as it is shown) of the visible widgets of the first node of a type."""
        return {name: (value, shown) for name, value, shown in self.page.evaluate(WIDGETS, node_type)}

    def search(self, words) -> list:
        """What the search for nodes lists."""
        self.command("Workspace.SearchBox.Toggle")
        field = self.page.locator("input[role=combobox], .comfy-vue-node-search-container input").last
        field.fill(words)
        self.page.wait_for_timeout(1500)
        return self.page.evaluate(OPTIONS)

    def drop(self, file: Path, kind: str):
        if kind == "application/json":
            self.page.evaluate(DROP, [file.name, file.read_text()])
            return
        self.page.evaluate("""([name, kind, bytes]) => {
            const carried = new DataTransfer()
            carried.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name, {type: kind}))
            const canvas = document.querySelector('#graph-canvas'), view = canvas.getBoundingClientRect()
            const where = {clientX: view.x + view.width / 2, clientY: view.y + view.height / 2, bubbles: true,
                           cancelable: true, dataTransfer: carried}
            canvas.dispatchEvent(new DragEvent('drop', where))
        }""", [file.name, kind, base64.b64encode(file.read_bytes()).decode()])

    def choose(self, entry, picture=None):
        """Takes an entry of the canvas' menu."""
        x, y = self.page.evaluate(EMPTY)
        self.page.mouse.click(x, y, button="right")
        self.page.wait_for_timeout(300)
        if picture:
            self.picture(picture)
        self.page.locator(".litemenu-entry", has_text=entry).click()

    def wait_for(self, *types):
        self.page.wait_for_function("types => types.every(type => app.graph.nodes.some(node => node.type === type))",
                                    arg=list(types))  # fmt: skip

    def start(self) -> str:
        """Presses Run; returns the prompt's id."""
        known = self.known()
        self.page.keyboard.press("Control+Enter")
        deadline = time.monotonic() + 60
        while not (new := self.known() - known):
            assert time.monotonic() < deadline, f"nothing was queued; the page says {self.page.evaluate(TOASTS)}"
            time.sleep(0.1)
        return new.pop()

    def known(self) -> set:
        queue = self.comfyui.get("/queue")
        return set(self.comfyui.get("/history")) | {one[1] for part in queue.values() for one in part}

    def run(self) -> dict:
        """Runs the graph, and returns what ComfyUI's history has of it."""
        entry = self.comfyui.wait(self.start(), timeout=IDLE)
        self.page.wait_for_timeout(700)
        return entry

    def report(self) -> str:
        self.page.wait_for_function(f"({REPORTS}).some(text => text)")
        return "\n".join(self.page.evaluate(REPORTS))

    def video(self) -> list:
        """[width, height, seconds, address] of the video that is shown."""
        self.page.wait_for_function(f"({VIDEO})()", timeout=60_000)
        return self.page.evaluate(VIDEO)
