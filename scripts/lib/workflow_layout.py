"""Lays out the nodes of a workflow, and draws groups around them."""

# The columns of a graph from left to right. A node is named by its custom title, else by its type. Nodes that a
# workflow lacks are skipped.
COLUMNS = [
    ["AscendParallelConfig"],
    ["AscendLoadDiffusionModel", "AscendLoadTextEncoder", "AscendLoadVAE", "CLIPVisionLoader", "High-noise model",
     "Low-noise model", "AscendUNETLoader", "AscendCLIPLoader", "AscendDualCLIPLoader", "AscendVAELoader"],
    ["LoRA of the high-noise expert", "Positive prompt", "Negative prompt", "EmptyHunyuanLatentVideo",
     "Wan22ImageToVideoLatent", "First frame", "Last frame"],
    ["CLIP of the first frame", "CLIP of the last frame"],
    ["LoRA of the low-noise expert", "AscendImageToVideo", "Shift of the model", "Shift of the high-noise model",
     "Shift of the low-noise model", "FluxGuidance", "WanImageToVideo"],
    ["AscendStepCache", "AscendRainFusion"],
    ["AscendSampler", "KSampler", "High-noise steps", "Low-noise steps"],
    ["AscendVAEDecode", "VAEDecode", "Without the first four frames", "CreateVideo", "SaveVideo"],
]
NOTE, NOTE_COLUMNS, NOTE_HEIGHT = "MarkdownNote", 2, 300  # below the first columns
SIZES = {  # width, height
    "AscendParallelConfig": (310, 250),
    "AscendLoadDiffusionModel": (540, 202),
    "AscendLoadTextEncoder": (540, 154),
    "AscendLoadVAE": (540, 106),
    "CLIPVisionLoader": (540, 58),
    "High-noise model": (540, 82),
    "Low-noise model": (540, 82),
    "AscendUNETLoader": (540, 82),
    "AscendCLIPLoader": (540, 106),
    "AscendDualCLIPLoader": (540, 130),
    "AscendVAELoader": (540, 58),
    "LoRA of the high-noise expert": (530, 106),
    "LoRA of the low-noise expert": (530, 106),
    "Positive prompt": (480, 220),
    "Negative prompt": (480, 220),
    "EmptyHunyuanLatentVideo": (480, 130),
    "Wan22ImageToVideoLatent": (480, 170),
    "First frame": (480, 350),
    "Last frame": (480, 350),
    "CLIP of the first frame": (300, 78),
    "CLIP of the last frame": (300, 78),
    "AscendImageToVideo": (400, 284),
    "Shift of the model": (400, 58),
    "Shift of the high-noise model": (400, 58),
    "Shift of the low-noise model": (400, 58),
    "FluxGuidance": (400, 58),
    "WanImageToVideo": (400, 210),
    "AscendStepCache": (340, 250),
    "AscendRainFusion": (340, 230),
    "AscendSampler": (340, 544),
    "KSampler": (340, 262),
    "High-noise steps": (340, 334),
    "Low-noise steps": (340, 334),
    "AscendVAEDecode": (400, 46),
    "VAEDecode": (400, 46),
    "Without the first four frames": (400, 82),
    "CreateVideo": (400, 78),
    "SaveVideo": (400, 300),
}
# The maximum number of pixels by which a node is taller in Nodes 2.0 than on the canvas (frontends 1.32 and 1.58; a
# missing model adds a line). This space stays free below it.
NODES_2 = {
    "AscendParallelConfig": 104,
    "AscendLoadDiffusionModel": 84,
    "AscendLoadTextEncoder": 80,
    "AscendLoadVAE": 60,
    "CLIPVisionLoader": 52,
    "High-noise model": 80,
    "Low-noise model": 80,
    "AscendUNETLoader": 80,
    "AscendCLIPLoader": 80,
    "AscendDualCLIPLoader": 104,
    "AscendVAELoader": 60,
    "LoRA of the high-noise expert": 60,
    "LoRA of the low-noise expert": 60,
    "EmptyHunyuanLatentVideo": 54,
    "Wan22ImageToVideoLatent": 60,
    "First frame": 240,  # with a square picture, as wide as the node
    "Last frame": 240,
    "CLIP of the first frame": 28,
    "CLIP of the last frame": 28,
    "AscendImageToVideo": 68,
    "Shift of the model": 34,
    "Shift of the high-noise model": 34,
    "Shift of the low-noise model": 34,
    "FluxGuidance": 34,
    "WanImageToVideo": 68,
    "KSampler": 110,
    "High-noise steps": 140,
    "Low-noise steps": 140,
    "AscendStepCache": 70,
    "AscendRainFusion": 56,
    "AscendVAEDecode": 32,
    "VAEDecode": 32,
    "Without the first four frames": 48,
    "CreateVideo": 32,
}
# The nodes that are enlarged to fill their column; the first of these in a column: pictures, previews and prompts.
GROWS = ("Last frame", "First frame", "AscendSampler", "SaveVideo", "Positive prompt")
SAME_HEIGHT = {"CLIP of the first frame": "First frame", "CLIP of the last frame": "Last frame"}  # begin at one height
COLOURS = {"Positive prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533"), NOTE: ("#432", "#653")}
PROMPTS, LORAS = ["Positive prompt", "Negative prompt"], "LoRAs"
SHIFTS = ["Shift of the high-noise model", "Shift of the low-noise model"]
GROUPS = {  # title: (its nodes, a colour). The group that contains the last node also takes nodes without a group
    "Ranks and models": ([*COLUMNS[0], *COLUMNS[1], NOTE], "#3f789e"),
    LORAS: (["LoRA of the high-noise expert", "LoRA of the low-noise expert"], "#b58b3a"),
    "Prompt and latent": ([*PROMPTS, "Wan22ImageToVideoLatent"], "#8A8"),
    "Prompt and size": ([*PROMPTS, "EmptyHunyuanLatentVideo"], "#8A8"),
    "Prompt and images": ([*PROMPTS, "First frame", "Last frame"], "#8A8"),
    "Prompt and image": ([*PROMPTS, "First frame"], "#8A8"),
    "Prompt": (PROMPTS, "#8A8"),
    "Conditioning": ([*COLUMNS[3], "AscendImageToVideo"], "#88A"),
    "Schedules and image": ([*SHIFTS, "WanImageToVideo"], "#88A"),
    "Schedules": (SHIFTS, "#88A"),
    "Schedule and guidance": (["Shift of the model", "FluxGuidance"], "#88A"),
    "Schedule": (["Shift of the model"], "#88A"),
    "Accelerate": (["AscendStepCache", "AscendRainFusion"], "#b58b3a"),
    "Sample": (["AscendSampler"], "#A88"),
    "Sample with core's sampler": (["KSampler"], "#A88"),
    "Sample with core's samplers": (["High-noise steps", "Low-noise steps"], "#A88"),
    "Video": (COLUMNS[-1], "#88A"),
}
GROUP_MARGIN, GROUP_HEADER, NODE_HEADER = 20, 50, 30
COLUMN_GAP, GROUP_GAP = 60, 80  # between the nodes of neighbouring columns
ROW_GAP, GROUP_ROW_GAP = 60, 120  # between the nodes of a column


def arrange(graph):
    """Gives every node of a graph in UI format its place, size and colour, and the graph its groups."""
    nodes = {_name(node): node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]), "two nodes have the same place"
    owners = _owners(nodes)
    places = _places(nodes, owners)
    for name, node in nodes.items():
        left, top, right, bottom = places[name]
        node["pos"], node["size"] = [left, top], [right - left, bottom - top - NODES_2.get(name, 0)]
        if name in COLOURS:
            node["color"], node["bgcolor"] = COLOURS[name]
    bottom = max(place[3] for place in places.values())
    titles = [title for title in GROUPS if title in owners.values()]
    graph["groups"] = []
    for number, title in enumerate(titles, start=1):
        members = [places[name] for name in nodes if owners[name] == title]
        graph["groups"].append(_group(number, title, members, None if title == LORAS else bottom))


def _name(node):
    return node["title"] if node.get("title") in SIZES else node["type"]


def _owners(names):
    """The title of each node's group."""
    owners = {}
    for title, (members, _) in GROUPS.items():
        if members[-1] in names:
            owners |= {name: title for name in members if name in names and name not in owners}
    return owners


def _places(names, owners):
    """(left, top, right, bottom) of each node without its title, with its height in Nodes 2.0."""
    places, columns, right, before = {}, [], None, None
    for column in COLUMNS:
        column = [name for name in column if name in names]
        if not column:
            continue
        group = owners[column[-1]]
        left = 0 if right is None else right + (COLUMN_GAP if group == before else GROUP_GAP)
        right, before = left + max(SIZES[name][0] for name in column), group
        top = 0
        for name, following in zip(column, [*column[1:], None]):
            places[name] = [left, top, left + SIZES[name][0], top + _height(name)]
            top = places[name][3] + (ROW_GAP if owners[name] == owners.get(following) else GROUP_ROW_GAP)
        columns.append(column)
    above = [places[name] for column in columns[:NOTE_COLUMNS] for name in column]
    top = max(place[3] for place in above) + ROW_GAP
    places[NOTE] = [0, top, max(place[2] for place in above), top + NOTE_HEIGHT]
    _grow(places, columns)
    for name in set(SAME_HEIGHT).intersection(places):
        left, _, right, _ = places[name]
        top = places[SAME_HEIGHT[name]][1]
        places[name] = [left, top, right, top + _height(name)]
    return places


def _height(name):
    return SIZES[name][1] + NODES_2.get(name, 0)


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
