"""Opens a real ComfyUI in a real browser: headless chromium, driven by playwright.

    with ComfyServer() as server, ComfyBrowser(server) as browser:
        browser.open(json.loads(Path("workflows/tiny_wan_text_to_video.json").read_text()))
        browser.page.screenshot(path="graph.png")
"""

import json
import shutil

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
MISSING_MODELS = "Comfy.Workflow.ShowMissingModelsWarning"  # settings of the page
NODES_2 = "Comfy.VueNodes.Enabled"


def chromium():
    """The path of chromium, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class ComfyBrowser:
    """ComfyUI's page in a browser; a context manager.

    server: a started ComfyServer. locale: of the user interface, such as "zh". size: of the page, in pixels.
    scale: screenshot pixels per page pixel. Attribute: page (playwright's).
    """

    def __init__(self, server, locale="en", size=(1600, 900), scale=1):
        self.server, self.locale, self.size, self.scale = server, locale, size, scale

    def __enter__(self):
        executable = chromium()
        if executable is None:
            raise FileNotFoundError("there is no chromium in PATH; install it with `apt-get install chromium`")
        self.server.post("/settings/Comfy.TutorialCompleted", True)  # else its dialog takes the clicks
        self.server.post(f"/settings/{MISSING_MODELS}", False)  # likewise
        self.server.post("/settings/Comfy.Locale", self.locale)
        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        width, height = self.size
        self.page = self._chromium.new_page(viewport={"width": width, "height": height},
                                            device_scale_factor=self.scale)
        self.page.set_default_timeout(90_000)
        self.reload()
        return self

    def __exit__(self, *_):
        self._chromium.close()
        self._playwright.stop()

    def reload(self):
        """Opens ComfyUI's page and waits until it is ready."""
        self.page.goto(self.server.url)
        self.page.wait_for_function("window.app?.vueAppReady && window.app.extensionManager && window.app.graph")

    def open(self, workflow):
        """Puts a workflow on the canvas, in UI or API format (a dict)."""
        self.page.evaluate("""async workflow => {
            if (workflow.nodes) await app.loadGraphData(workflow)
            else await app.loadApiJson(workflow, 'workflow')
        }""", workflow)
        self.page.wait_for_timeout(500)  # widgets are laid out in the next animation frames

    def graph(self):
        """The graph on the canvas in UI format."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))  # leaves undefined out

    def prompt(self):
        """The graph on the canvas in API format, as ComfyUI would queue it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def least_heights(self):
        """The height that each node of the graph needs on the canvas, by its id, without its title."""
        sizes = self.page.evaluate("app.graph.nodes.map(node => [node.id, node.computeSize()[1]])")
        return {int(number): height for number, height in sizes}

    def boxes_in_nodes_2(self, workflow):
        """Opens a workflow in UI format in Nodes 2.0, and returns its `boxes`."""
        lefts, tops, rights, bottoms = zip(*((x, y, x + width, y + height) for (x, y), (width, height) in
                                             ((node["pos"], node["size"]) for node in workflow["nodes"])))  # fmt: skip
        self.page.evaluate(f"app.extensionManager.setting.set('{NODES_2}', true)")
        try:
            self.open(workflow)
            self.show((min(lefts), min(tops), max(rights) - min(lefts), max(bottoms) - min(tops)))
            return self.boxes()
        finally:
            self.page.evaluate(f"app.extensionManager.setting.set('{NODES_2}', false)")

    def boxes(self):
        """(left, top, right, bottom) of each visible node by its id, in graph pixels, as Nodes 2.0 draws it (the
        setting `NODES_2`). Waits until nodes stop moving."""
        return {int(number): box for number, box in self.page.evaluate("""async () => {
            const boxes = () => [...document.querySelectorAll('[data-node-id]')].map(node => {
                const {left, top, right, bottom} = node.getBoundingClientRect()
                return [node.dataset.nodeId, [left, top, right, bottom].map(side => side / app.canvas.ds.scale)]
            })
            for (let now = '[]', rests = 0; rests < 5; ) { // looks in a row, as a busy machine draws late
                const before = now
                await new Promise(done => setTimeout(done, 200))
                now = JSON.stringify(boxes())
                rests = now === before && now !== '[]' ? rests + 1 : 0
            }
            return boxes()
        }""")}

    def show(self, bounds, margin=40):
        """Zooms the canvas to the area (x, y, width, height), with a margin in pixels."""
        self.page.evaluate("""([[x, y, width, height], margin]) => {
            const canvas = app.canvas, view = canvas.canvas.getBoundingClientRect()
            const scale = Math.min((view.width - 2 * margin) / width, (view.height - 2 * margin) / height)
            canvas.ds.scale = scale
            canvas.ds.offset = [view.width / scale / 2 - x - width / 2, view.height / scale / 2 - y - height / 2]
            canvas.setDirty(true, true)
        }""", [bounds, margin])
        self.page.wait_for_timeout(500)
