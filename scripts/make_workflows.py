"""Makes the UI-format workflows of workflows/ from the API-format ones of workflows/api/, in the real ComfyUI page.

    .venv/bin/python scripts/make_workflows.py                        # all of them
    .venv/bin/python scripts/make_workflows.py tiny_wan_text_to_video # these
    .venv/bin/python scripts/make_workflows.py --frontend DIR         # measured in this page too

The API format defines what a workflow does. This script adds the notes and the download links, measures the nodes on
the canvas and in Nodes 2.0, and places them. It makes the blueprints of subgraphs/ from them too. DIR is the folder
`static` of another comfyui-frontend-package: make the workflows with the newest, as its nodes may be taller.
"""

import argparse
import copy
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from ascend_runtime.commands import templates  # noqa: E402
from ascend_runtime.commands.downloading.options import files_by_name  # noqa: E402
from ascend_runtime.models.hubs import HUGGING_FACE, MODELSCOPE  # noqa: E402
from scripts.lib.comfy_browser import ComfyBrowser  # noqa: E402
from scripts.lib.comfy_server import ComfyServer  # noqa: E402
from scripts.lib import predictions  # noqa: E402
from scripts.lib.blueprints import BLUEPRINTS, blueprint  # noqa: E402
from scripts.lib.workflow_layout import LEAST_HEIGHTS, NOTE, arrange, name_of, width_of  # noqa: E402
from scripts.lib.workflow_notes import note, table_of  # noqa: E402

FILES = files_by_name()  # that workflows link to
NODE_HEADER = 30
ROUNDING = 4  # pixels by which a page's measures differ with its zoom


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="short names (default: all)")
    parser.add_argument("--predict", action="store_true", help="predict seconds and memory again, which takes minutes")
    parser.add_argument("--frontend", metavar="DIR", type=Path, help="the files of another version of the page")
    arguments = parser.parse_args()
    names = arguments.names or templates.SHORT
    prompts = {short: json.loads(templates.api_file(short).read_text()) for short in names}
    with page() as browser:
        graphs = {short: opened(browser, prompts[short]) for short in names}
        for short, graph in graphs.items():
            add_note(graph, short, predicted(short, prompts[short], arguments.predict))
        measured = [{short: heights(browser, graph) for short, graph in graphs.items()}]
    if arguments.frontend:
        with page("--front-end-root", str(arguments.frontend.resolve())) as browser:
            measured.append({short: heights(browser, graph) for short, graph in graphs.items()})
    with page() as browser:
        for short, graph in graphs.items():
            arrange(graph, largest([one[short] for one in measured]))
            workflow = tidied(opened(browser, graph))  # as it will be opened: the page adds defaults when it saves
            made = without_titles(browser.prompt())
            assert made == without_titles(prompts[short]), f"{short}: the page made another prompt"
            target = templates.shown_file(short)
            target.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
            print(target.relative_to(REPOSITORY))
    for name, (short, *_) in BLUEPRINTS.items():
        made = blueprint(name, json.loads(templates.shown_file(short).read_text()))
        (REPOSITORY / "subgraphs" / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def page(*options):
    """A page of a ComfyUI with these options."""
    with ComfyServer(extra_args=options) as server:
        Image.new("RGB", (80, 80)).save(server.base / "input" / "example.png")  # a picture as high as it is wide
        with ComfyBrowser(server) as browser:
            yield browser


def opened(browser, workflow):
    browser.open(workflow)
    return browser.graph()


def heights(browser, graph):
    """(on the canvas, in Nodes 2.0) of each node by its id, without the title, in this page."""
    browser.open(graph)
    canvas = browser.least_heights()
    apart = copy.deepcopy(graph)
    for place, node in enumerate(apart["nodes"]):
        height = max(canvas[node["id"]], LEAST_HEIGHTS.get(name_of(node), 0))
        node |= {"pos": [place % 6 * 1000, place // 6 * 1200], "size": [width_of(node), height]}
    boxes = browser.boxes_in_nodes_2(apart)
    return {number: (height, boxes[number][3] - boxes[number][1] - NODE_HEADER) for number, height in canvas.items()}


def largest(measured):
    """(on the canvas, in any mode) of each node by its id, the largest of several pages."""
    found = {}
    for number in measured[0]:
        canvas, other = (max(sizes) for sizes in zip(*(one[number] for one in measured)))
        found[number] = math.ceil(canvas), math.ceil(max(canvas, other)) + ROUNDING
    return found


def published(node):
    """The files that a node of a UI-format graph loads, in the form of ComfyUI's page: name, folder, URL."""
    values = node.get("widgets_values") or []
    names = [value for value in values if isinstance(value, str) and value.endswith(".safetensors")]
    return [{"name": name, "url": FILES[name].address(HUGGING_FACE), "directory": FILES[name].folder} for name in names]


def predicted(short, prompt, again):
    """The table of what a workflow's video takes: the one that its note has, or a new one; empty if it has no downloads
    or uses core's sampler."""
    if not published_in(prompt) or "AscendSampler" not in [node["class_type"] for node in prompt.values()]:
        return ""
    target = templates.shown_file(short)
    kept = ""
    if target.exists() and not again:
        nodes = json.loads(target.read_text())["nodes"]
        kept = table_of(next(node["widgets_values"][0] for node in nodes if node["type"] == NOTE))
    return kept or predictions.table(prompt)


def published_in(prompt):
    """Whether a workflow in API format loads a file that is published."""
    return any(str(value).endswith(".safetensors") for node in prompt.values() for value in node["inputs"].values())


def add_note(graph, short, table):
    """Adds the workflow's note to its graph."""
    files = [(file["name"], file["directory"], file["url"], FILES[file["name"]].address(MODELSCOPE))
             for node in graph["nodes"] for file in published(node)]  # fmt: skip
    number = max(node["id"] for node in graph["nodes"]) + 1
    graph["nodes"].append({"id": number, "type": NOTE, "pos": [0, 0], "size": [0, 0], "flags": {}, "mode": 0,
                           "order": 0, "inputs": [], "outputs": [], "title": "Read me / 说明", "properties": {},
                           "widgets_values": [note(short, files, table)]})
    graph["last_node_id"] = number


def tidied(graph):
    """The graph without what changes with each save, with its upper left corner in view."""
    graph["extra"] = {"ds": {"scale": 0.6, "offset": [120, 340]}}
    graph.pop("id", None)
    for node in graph["nodes"]:
        models = published(node)
        node["properties"] = {"Node name for S&R": node["type"]} | ({"models": models} if models else {})
        for slot in node.get("inputs", []) + node.get("outputs", []):
            slot.pop("localized_name", None)
    return graph


def without_titles(prompt):
    """Nor the choice of this machine, which the workflows leave out, as clusters belong to a host."""
    return {number: {"class_type": node["class_type"], "inputs": _stored(node)} for number, node in prompt.items()}


def _stored(node):
    return {name: value for name, value in node["inputs"].items() if (name, value) != ("cluster", "this machine")}


if __name__ == "__main__":
    main()
