"""Makes the UI-format workflows of workflows/ from the API-format ones of workflows/api/, in the real ComfyUI page.

    .venv/bin/python scripts/make_workflows.py

The API format says what a workflow does; here stands where its nodes lie, how they are grouped and what its note says.
Nodes of the same kind lie in the same place in every workflow.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = REPOSITORY / "workflows"
sys.path.insert(0, str(REPOSITORY / "scripts" / "lib"))
from comfy_browser import ComfyBrowser  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402

# Where a node lies: x, y, width, height, by title for those that have one of their own.
PLACES = {
    "AscendParallelConfig": (0, 0, 310, 250),
    "AscendLoadDiffusionModel": (370, 0, 400, 178),
    "AscendLoadTextEncoder": (370, 238, 400, 106),
    "AscendLoadVAE": (370, 404, 400, 82),
    "MarkdownNote": (0, 546, 770, 206),
    "Positive prompt": (850, 0, 420, 236),
    "Negative prompt": (850, 296, 420, 236),
    "EmptyHunyuanLatentVideo": (850, 592, 420, 160),
    "AscendSampler": (1350, 0, 340, 752),  # high enough for the preview below its widgets
    "AscendVAEDecode": (1770, 0, 400, 46),
    "CreateVideo": (1770, 106, 400, 78),
    "SaveVideo": (1770, 244, 400, 508),  # high enough for the video
}
COLOURS = {"Positive prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533"), "MarkdownNote": ("#432", "#653")}
GROUPS = {  # title: the titles or types of the nodes in it, and a colour
    "1. Ranks and models": (
        ["AscendParallelConfig", "AscendLoadDiffusionModel", "AscendLoadTextEncoder", "AscendLoadVAE", "MarkdownNote"],
        "#3f789e",
    ),
    "2. Prompt and size": (["Positive prompt", "Negative prompt", "EmptyHunyuanLatentVideo"], "#8A8"),
    "3. Sample": (["AscendSampler"], "#A88"),
    "4. Video": (["AscendVAEDecode", "CreateVideo", "SaveVideo"], "#88A"),
}
GROUP_MARGIN, GROUP_HEADER, NODE_HEADER = 20, 50, 30

NOTES = {
    "tiny_wan_text_to_video": """\
## A first video, without a download

Press **Run**. The ranks start with the first video and stay for the next ones. Any machine will do, a CPU too.

The embedded model is small: 64 x 64 pixels, 17 frames, one shape that moves. It knows sentences like \
`a red circle moving right on a blue background`, made of these words:

| shape | colour | moving | background |
|---|---|---|---|
| circle, square, triangle | red, green, yellow, white, cyan | left, right, up, down | black, gray, blue, purple |

点击**运行**即可，无需下载：任何机器（包括 CPU）都能生成。提示词请用上表中的英文词。
""",
    "wan2.2_t2v_a14b_text_to_video": """\
## Wan2.2-T2V-A14B

1. Download the diffusers folder (both experts, text encoder and VAE in one) **into `ComfyUI/models/diffusers`**, \
by one of these:

```
hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers --local-dir Wan2.2-T2V-A14B-Diffusers
modelscope download --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --local_dir Wan2.2-T2V-A14B-Diffusers
```

2. Press **R** to refresh the lists, then **Run**. Zeros in Ascend Parallel Config take every visible card.

The settings are the original's. Other sizes: 1280 x 720, or any multiples of 16; length 4n+1.

将上述 diffusers 目录下载到 `ComfyUI/models/diffusers`（Hugging Face 或 ModelScope 任选其一），按 **R** 刷新后点击**运行**。\
并行配置全部为 0 时使用所有可见的卡。
""",
}


def main():
    with ComfyServer() as server, ComfyBrowser(server) as browser:
        for api in sorted((WORKFLOWS / "api").glob("*.json")):
            prompt = json.loads(api.read_text())
            browser.open(prompt)
            workflow = arranged(browser.graph(), note=NOTES[api.stem])
            browser.open(workflow)  # as it will be opened: the page completes what it saves
            workflow = tidied(browser.graph())
            assert without_titles(browser.prompt()) == without_titles(prompt), f"{api}: the page made another prompt"
            target = WORKFLOWS / api.name
            target.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
            print(target.relative_to(REPOSITORY))


def arranged(graph, note):
    """The graph, with its note, every node in its place and the groups drawn around them."""
    number = max(node["id"] for node in graph["nodes"]) + 1
    graph["nodes"].append({"id": number, "type": "MarkdownNote", "pos": [0, 0], "size": [0, 0], "flags": {}, "mode": 0,
                           "order": 0, "inputs": [], "outputs": [], "title": "Read me", "properties": {},
                           "widgets_values": [note]})
    graph["last_node_id"] = number
    for node in graph["nodes"]:
        x, y, width, height = PLACES[_place(node)]
        node["pos"], node["size"] = [x, y], [width, height]
        if _place(node) in COLOURS:
            node["color"], node["bgcolor"] = COLOURS[_place(node)]
    graph["groups"] = [_group(number, title) for number, title in enumerate(GROUPS, start=1)]
    return graph


def tidied(graph):
    """The graph without what changes from one saving to the next, opened with its left edge in view."""
    graph["extra"] = {"ds": {"scale": 0.6, "offset": [120, 260]}}
    graph.pop("id", None)
    for node in graph["nodes"]:
        node["properties"] = {"Node name for S&R": node["type"]}
        for slot in node.get("inputs", []) + node.get("outputs", []):
            slot.pop("localized_name", None)
    return graph


def without_titles(prompt):
    return {number: {key: node[key] for key in ("class_type", "inputs")} for number, node in prompt.items()}


def _place(node):
    return node["title"] if node.get("title") in PLACES else node["type"]


def _group(number, title):
    members, colour = GROUPS[title]
    places = [PLACES[member] for member in members]
    left = min(x for x, _, _, _ in places) - GROUP_MARGIN
    top = min(y for _, y, _, _ in places) - NODE_HEADER - GROUP_HEADER
    right = max(x + width for x, _, width, _ in places) + GROUP_MARGIN
    bottom = max(y + height for _, y, _, height in places) + GROUP_MARGIN
    return {"id": number, "title": title, "bounding": [left, top, right - left, bottom - top], "color": colour,
            "font_size": 24, "flags": {}}


if __name__ == "__main__":
    main()
