"""Lays out the nodes of a workflow, and draws groups around them.

Heights are measured in ComfyUI's page, so that nothing overlaps on the canvas or in Nodes 2.0; see make_workflows.py.
"""

# The columns of a graph from left to right. A node is named by the English part of its custom title, else by its type.
# Nodes that a workflow lacks are skipped.
COLUMNS = [
    ["AscendParallelConfig"],
    ["AscendLoadDiffusionModel", "AscendLoadTextEncoder", "AscendLoadVAE", "CLIPVisionLoader", "High-noise model",
     "Low-noise model", "AscendUNETLoader", "AscendCLIPLoader", "AscendDualCLIPLoader", "AscendVAELoader"],
    ["4 steps, on or off", "Prompt", "Negative prompt", "EmptyHunyuanLatentVideo", "Wan22ImageToVideoLatent",
     "AscendVideoSize", "First frame", "Last frame"],
    ["CLIP of the first frame", "CLIP of the last frame"],
    ["AscendImageToVideo", "Shift", "Shift, high noise", "Shift, low noise", "FluxGuidance", "WanImageToVideo"],
    ["AscendStepCache", "AscendRainFusion"],
    ["AscendSampler", "KSampler", "High-noise steps", "Low-noise steps"],
    ["AscendVAEDecode", "VAEDecode", "Without the first four frames", "CreateVideo", "SaveVideo"],
]
NOTE, NOTE_COLUMNS = "MarkdownNote", 2  # below the first columns
WIDTHS = [310, 540, 480, 360, 400, 340, 340, 420]  # of the columns
LEAST_HEIGHTS = {
    NOTE: 300, "Prompt": 180, "Negative prompt": 160, "SaveVideo": 300, "First frame": 330, "Last frame": 330,
}  # fmt: skip
WITH_REPORTS = {"AscendVAEDecode": 130}  # heights of nodes that grow when a video is done
# The nodes that are enlarged to fill their column; the first of these in a column: pictures, previews and prompts.
GROWS = ("Last frame", "First frame", "AscendSampler", "SaveVideo", "Prompt")
SAME_HEIGHT = {"CLIP of the first frame": "First frame", "CLIP of the last frame": "Last frame"}  # begin at one height
COLOURS = {"Prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533"), NOTE: ("#432", "#653")}
PROMPTS, FEW_STEPS = ["Prompt", "Negative prompt"], "4 steps / 4 步"
SHIFTS = ["Shift, high noise", "Shift, low noise"]
GROUPS = {  # title: (its nodes, a colour). The group that contains the last node also takes nodes without a group
    "Ranks and models / 进程与模型": ([*COLUMNS[0], *COLUMNS[1], NOTE], "#3f789e"),
    FEW_STEPS: (["4 steps, on or off"], "#b58b3a"),
    "Prompt and images / 提示词与图像": ([*PROMPTS, "AscendVideoSize", "First frame", "Last frame"], "#8A8"),
    "Prompt and image / 提示词与图像": ([*PROMPTS, "AscendVideoSize", "First frame"], "#8A8"),
    "Prompt and size / 提示词与尺寸": ([*PROMPTS, "AscendVideoSize"], "#8A8"),
    "Prompt and latent / 提示词与 Latent": ([*PROMPTS, "Wan22ImageToVideoLatent"], "#8A8"),
    "Prompt and empty latent / 提示词与空 Latent": ([*PROMPTS, "EmptyHunyuanLatentVideo"], "#8A8"),
    "Conditioning / 条件": ([*COLUMNS[3], "AscendImageToVideo"], "#88A"),
    "Schedules and image / 调度与图像": ([*SHIFTS, "WanImageToVideo"], "#88A"),
    "Schedules / 调度": (SHIFTS, "#88A"),
    "Schedule and guidance / 调度与引导": (["Shift", "FluxGuidance"], "#88A"),
    "Schedule / 调度": (["Shift"], "#88A"),
    "Accelerate / 加速": (["AscendStepCache", "AscendRainFusion"], "#b58b3a"),
    "Sample / 采样": (["AscendSampler"], "#A88"),
    "Sample with core's sampler / 核心采样器": (["KSampler"], "#A88"),
    "Sample with core's samplers / 核心采样器": (["High-noise steps", "Low-noise steps"], "#A88"),
    "Video / 视频": (COLUMNS[-1], "#88A"),
}
GROUP_MARGIN, GROUP_HEADER, NODE_HEADER = 20, 50, 30
COLUMN_GAP, GROUP_GAP = 60, 80  # between the nodes of neighbouring columns
ROW_GAP, GROUP_ROW_GAP = 60, 120  # between the nodes of a column


def name_of(node):
    """How the tables here name a node."""
    title = (node.get("title") or "").split(" / ")[0]
    return title if any(title in column for column in COLUMNS) else node["type"]


def width_of(node):
    name = name_of(node)
    return next((width for column, width in zip(COLUMNS, WIDTHS) if name in column), sum(WIDTHS[:NOTE_COLUMNS]))


def arrange(graph, heights):
    """Gives every node of a graph in UI format its place, size and colour, and the graph its groups.

    heights: (of the canvas, the largest in any mode) of each node by its id, without the title. A node is saved with
    the first; the second stays free for it.
    """
    nodes = {name_of(node): node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]), "two nodes have the same place"
    saved, room = {}, {}
    for name, node in nodes.items():
        canvas, largest = heights[node["id"]]
        saved[name] = max(canvas, LEAST_HEIGHTS.get(name, 0))
        room[name] = max(largest, saved[name], WITH_REPORTS.get(name, 0))
    saved[NOTE] = room[NOTE]  # which Nodes 2.0 draw as high as its text is
    owners = _owners(nodes)
    places = _places(room, owners)
    for name, node in nodes.items():
        left, top, right, bottom = places[name]
        node["pos"], node["size"] = [left, top], [right - left, bottom - top - (room[name] - saved[name])]
        if name in COLOURS:
            node["color"], node["bgcolor"] = COLOURS[name]
    bottom = max(place[3] for place in places.values())
    titles = [title for title in GROUPS if title in owners.values()]
    graph["groups"] = []
    for number, title in enumerate(titles, start=1):
        members = [places[name] for name in nodes if owners[name] == title]
        graph["groups"].append(_group(number, title, members, None if title == FEW_STEPS else bottom))


def _owners(names):
    """The title of each node's group."""
    owners = {}
    for title, (members, _) in GROUPS.items():
        if members[-1] in names:
            owners |= {name: title for name in members if name in names and name not in owners}
    return owners


def _places(room, owners):
    """(left, top, right, bottom) of each node without its title. room: the height that each of them needs."""
    places, columns, right, before = {}, [], None, None
    for column, width in zip(COLUMNS, WIDTHS):
        column = [name for name in column if name in room]
        if not column:
            continue
        group = owners[column[-1]]
        left = 0 if right is None else right + (COLUMN_GAP if group == before else GROUP_GAP)
        right, before = left + width, group
        top = 0
        for name, following in zip(column, [*column[1:], None]):
            places[name] = [left, top, right, top + room[name]]
            top = places[name][3] + (ROW_GAP if owners[name] == owners.get(following) else GROUP_ROW_GAP)
        columns.append(column)
    above = [places[name] for column in columns[:NOTE_COLUMNS] for name in column]
    top = max(place[3] for place in above) + ROW_GAP
    places[NOTE] = [0, top, max(place[2] for place in above), top + room[NOTE]]
    _grow(places, columns)
    for name in set(SAME_HEIGHT).intersection(places):
        left, _, right, _ = places[name]
        top = places[SAME_HEIGHT[name]][1]
        places[name] = [left, top, right, top + room[name]]
    return places


def _grow(places, columns):
    """Stretches all columns to the height of the longest."""
    bottom = max(place[3] for place in places.values())
    places[NOTE][3] = bottom
    for column in columns:
        grows = [name for name in GROWS if name in column]
        if grows:
            room = bottom - places[column[-1]][3]
            for name in column[column.index(grows[0]) + 1 :]:
                places[name][1] += room
                places[name][3] += room
            places[grows[0]][3] += room


def _group(number, title, places, bottom):
    """A group around these boxes, down to `bottom` if given."""
    left = min(place[0] for place in places) - GROUP_MARGIN
    top = min(place[1] for place in places) - NODE_HEADER - GROUP_HEADER
    right = max(place[2] for place in places) + GROUP_MARGIN
    bottom = (bottom or max(place[3] for place in places)) + GROUP_MARGIN
    return {"id": number, "title": f"{number}. {title}", "bounding": [left, top, right - left, bottom - top],
            "color": GROUPS[title][1], "font_size": 24, "flags": {}}
