"""ComfyUI's own templates (scripts/lib/templates.py) as prompts, made small: sizes, lengths and steps; models and
pictures are random ones under the names that a template asks for."""

import json
from pathlib import Path

import av
import comfy_graphs as graphs
import numpy as np
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image
from scripts.lib import templates
from stock_models import FOLDER

# Those that run on ranks, by name; the ones behind a "+" in the form of the newest package.
NAMES = (
    "text_to_video_wan", "image_to_video_wan", "wan2.1_flf2v_720_f16", "video_wan_ati", "wan2.1_fun_control",
    "wan2.1_fun_inp", "video_wan2_2_14B_t2v", "video_wan2_2_14B_i2v", "video_wan2_2_14B_flf2v",
    "03_video_wan2_2_14B_i2v_subgraphed", "video_wan2_2_14B_fun_control", "video_wan2_2_14B_fun_inpaint",
    "video_wan2_2_5B_ti2v", "video_wan2_2_5B_fun_control", "video_wan2_2_5B_fun_inpaint",
    "hunyuan_video_text_to_video", "+video_wan2_2_14B_t2v", "+video_wan2_2_14B_i2v", "+video_wan2_2_14B_flf2v",
)  # fmt: skip
SIZE = {"width": 96, "height": 64, "length": 9}
STEPS = 4
MODELS = ("unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "lora_name")
VIRTUAL = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}  # nodes of the page
SAVED = "saved"  # the node that saves the latent of a prompt
DECODES = ("VAEDecode", "VAEDecodeTiled", "AscendVAEDecode")


def workflow(name: str) -> dict:
    """The template, in UI format."""
    return json.loads(templates.file(name.removeprefix("+"), newest=name.startswith("+")).read_text())


def subgraphs_of(shown: dict) -> list[dict]:
    return shown.get("definitions", {}).get("subgraphs", [])


def nodes_of(shown: dict) -> list[dict]:
    """The nodes of a workflow and of its subgraphs."""
    return [node for graph in (shown, *subgraphs_of(shown)) for node in graph["nodes"]]


def missing(name: str, nodes: dict) -> set[str]:
    """The classes of a template's nodes that a server with these (`/object_info`) does not know."""
    shown = workflow(name)
    used = {node["type"] for node in nodes_of(shown)} - {graph["id"] for graph in subgraphs_of(shown)}
    return used - VIRTUAL - set(nodes)


def prompt(shown: dict, nodes: dict) -> dict:
    """A workflow in UI format as the page would queue it, made small, with the sampled latent saved in the place of a
    video. nodes: the server's `/object_info`."""
    graph = convert_ui_to_api(shown, nodes)
    for node in graph.values():
        _make_small(node)
    (decoded,) = (node["inputs"]["samples"] for node in graph.values() if node["class_type"] in DECODES)
    graph[SAVED] = graphs.save_latent(decoded)
    return {number: graph[number] for number in _needed(graph, SAVED)}


def _make_small(node: dict) -> None:
    inputs = node["inputs"]
    inputs |= {name: value for name, value in SIZE.items() if name in inputs}
    inputs |= {name: f"{FOLDER}/{inputs[name]}" for name in MODELS if isinstance(inputs.get(name), str)}
    if node["class_type"] == "PrimitiveInt" and inputs["value"] > STEPS:  # steps, and the step between two experts
        inputs["value"] //= 20 // STEPS
    steps = inputs.get("steps")
    if isinstance(steps, int) and steps > STEPS:
        for name in ("start_at_step", "end_at_step"):
            if name in inputs:
                inputs[name] = inputs[name] * STEPS // steps
        inputs["steps"] = STEPS


def _needed(graph: dict, last: str) -> list[str]:
    """The numbers of a node and of all before it."""
    found, rest = [], [last]
    while rest:
        number = rest.pop()
        if number not in found:
            found.append(number)
            links = (value for value in graph[number]["inputs"].values() if isinstance(value, list))
            rest += [link[0] for link in links]
    return found


def on_ranks(graph: dict, ranks: int) -> dict:
    """The prompt with its loaders on so many ranks."""
    loaders = [node for node in graph.values() if node["class_type"].startswith("Ascend")]
    for node in loaders:
        node["inputs"]["parallel"] = ["ranks", 0]
    parallel = graphs.video(ranks=ranks)[graphs.PARALLEL]
    return {**graph, "ranks": parallel} if loaders else graph


def draw_inputs(graph: dict, folder: Path) -> None:
    """Random pictures and videos under the names that a prompt asks for, in ComfyUI's folder `input`."""
    for node in graph.values():
        name = node["inputs"].get({"LoadImage": "image", "LoadVideo": "file"}.get(node["class_type"]))
        if name and not (folder / name).exists():
            rng = np.random.default_rng(sum(name.encode()))
            frames = rng.integers(0, 255, (13, 80, 112, 3), dtype=np.uint8)
            if node["class_type"] == "LoadImage":
                Image.fromarray(frames[0]).save(folder / name)
            else:
                _write_video(folder / name, frames)


def _write_video(file: Path, frames: np.ndarray) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=16, pix_fmt="yuv420p")
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
