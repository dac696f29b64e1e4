"""Makes blueprints of subgraphs/ from workflows: one node for a whole graph, in ComfyUI's node library.

The format is that of ComfyUI's own blueprints: a workflow with a definition and one node of its type. The definition's
inputs are linked to widgets inside, and are the widgets of the node.
"""

import copy
import uuid

from .workflow_layout import NOTE

OUTSIDE = (NOTE, "LoadImage", "SaveVideo")  # types of nodes that stay outside
INPUT_NODE, OUTPUT_NODE = -10, -20  # ids of the definition's ends
SEEDS = ("seed", "control_after_generate")
BLUEPRINTS = {  # by the name in the node library: the workflow's short name, its category, what it does
    "Ascend Text to Video (Tiny Wan)": ("tiny_wan_text_to_video", "Text to video",
                                        "Makes a small video of a moving shape, without a download."),
    "Ascend Text to Video (Wan 2.2)": ("wan2.2_t2v_a14b_text_to_video", "Text to video",
                                       "Makes a video from a prompt with Wan2.2-T2V-A14B, on all cards."),
    "Ascend Image to Video (Wan 2.2)": ("wan2.2_i2v_a14b_image_to_video", "Image to video",
                                        "Makes a video that begins with an image with Wan2.2-I2V-A14B, on all cards."),
}  # fmt: skip
CATEGORY = "Video generation and editing"
# The node's inputs: a name, and the nodes inside with their input. Those that a workflow lacks are skipped.
INPUTS = [
    ("start_image", "AscendImageToVideo", "start_image"),
    ("prompt", "5", "text"),
    ("negative_prompt", "6", "text"),
    ("width", "AscendVideoSize", "width"),
    ("height", "AscendVideoSize", "height"),
    ("seconds", "AscendVideoSize", "seconds"),
    ("few_steps", "AscendFewStepLora", "few_steps"),
]


def blueprint(name, workflow):
    """The blueprint of a workflow in UI format, as a dict."""
    _, category, text = BLUEPRINTS[name]
    inside = {node["id"]: copy.deepcopy(node) for node in workflow["nodes"] if node["type"] not in OUTSIDE}
    links = [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
             for link in workflow["links"] if link[1] in inside and link[3] in inside]  # fmt: skip
    _unlinked(inside, {link["id"] for link in links})
    last = max(link[0] for link in workflow["links"])
    ends, shown = [], []
    for title, node, slot, place in _inputs(inside):
        last += 1
        end = inside[node]["inputs"][slot]
        end["link"] = last
        links.append({"id": last, "origin_id": INPUT_NODE, "origin_slot": len(ends), "target_id": node,
                      "target_slot": slot, "type": end["type"]})  # fmt: skip
        ends.append({"id": _id(name, title), "name": title, "type": end["type"], "linkIds": [last], "pos": [0, 0]})
        shown.append((title, end, place))
    video = next(node for node in inside.values() if node["type"] == "CreateVideo")
    last += 1
    video["outputs"][0]["links"] = [last]
    links.append({"id": last, "origin_id": video["id"], "origin_slot": 0, "target_id": OUTPUT_NODE, "target_slot": 0,
                  "type": "VIDEO"})  # fmt: skip
    right = max(node["pos"][0] + node["size"][0] for node in inside.values())
    definition = {
        "id": _id(name, "definition"), "version": 1, "revision": 0, "config": {}, "name": name, "widgets": [],
        "state": {"lastGroupId": len(workflow["groups"]), "lastNodeId": max(inside), "lastLinkId": last,
                  "lastRerouteId": 0},
        "inputNode": {"id": INPUT_NODE, "bounding": [-320, 0, 140, 20 * len(ends) + 40]},
        "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 200, 0, 140, 60]},
        "inputs": ends,
        "outputs": [{"id": _id(name, "VIDEO"), "name": "VIDEO", "type": "VIDEO", "linkIds": [last], "pos": [0, 0]}],
        "nodes": list(inside.values()), "groups": [], "links": links, "extra": {},
        "category": f"{CATEGORY}/{category}", "description": text,
    }  # fmt: skip
    node = _node(definition, shown, next(node["id"] for node in inside.values() if node["type"] == "AscendSampler"))
    return {"id": _id(name, "workflow"), "revision": 0, "last_node_id": node["id"], "last_link_id": last,
            "nodes": [node], "links": [], "groups": [], "definitions": {"subgraphs": [definition]}, "config": {},
            "extra": {}, "version": 0.4}  # fmt: skip


def _inputs(inside):
    """(name, node, slot, the place of its value among the node's or None) of each entry of INPUTS that there is."""
    for title, wanted, name in INPUTS:
        for node in inside.values():
            if wanted in (node["type"], str(node["id"])):
                names = [slot["name"] for slot in node["inputs"]]
                widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
                value = node["widgets_values"][widgets.index(name)] if name in widgets else None
                yield title, node["id"], names.index(name), value


def _unlinked(inside, kept):
    """Takes links that are not kept from nodes."""
    for node in inside.values():
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in kept else None
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] or () if link in kept]


def _node(definition, shown, sampler):
    """The one node of a blueprint. shown: (name, the input inside, its value)."""
    inputs, values = [], []
    for title, end, value in shown:
        widget = {"widget": {"name": title}} if "widget" in end else {}
        inputs.append({"name": title, "type": end["type"], **widget, "link": None})
        values += [value] if widget else []
    names = [["-1", slot["name"]] for slot in inputs if "widget" in slot] + [[str(sampler), name] for name in SEEDS]
    return {"id": max(node["id"] for node in definition["nodes"]) + 1, "type": definition["id"], "pos": [0, 0],
            "size": [420, 420], "flags": {}, "order": 0, "mode": 0, "inputs": inputs,
            "outputs": [{"name": "VIDEO", "type": "VIDEO", "links": None}],
            "properties": {"proxyWidgets": names}, "widgets_values": values}  # fmt: skip


def _id(*names):
    """Always the same for the same names, so that making a blueprint again changes nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("ascend-video", *names))))
