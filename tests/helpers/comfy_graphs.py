"""Graphs in API format for the tests: the pack's own text-to-video workflow, made small or changed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from scripts.lib.comfy_server import PromptRejected
from safetensors.torch import load_file

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "tiny_wan_text_to_video.json"
PARALLEL, MODEL, ENCODER, VAE, POSITIVE, NEGATIVE, EMPTY, SAMPLER, DECODE, VIDEO, SAVE = map(str, range(1, 12))
RANDOM = "random_wan"  # names under which the `comfyui` fixture has models
HEAVY = "heavy_wan"


def video(model=RANDOM, ranks=2, length=9, size=64, **sampler) -> dict:
    """The workflow with this model for all parts; `sampler` changes widgets of Ascend Sampler. Two ranks, as in most
    tests: each other number has new ones started."""
    graph = copy.deepcopy(json.loads(WORKFLOW.read_text()))
    for node in (MODEL, ENCODER, VAE):
        graph[node]["inputs"]["model_name"] = model
    graph[PARALLEL]["inputs"]["ranks"] = ranks
    graph[EMPTY]["inputs"].update(width=size, height=size, seconds=(length - 1) / graph[EMPTY]["inputs"]["fps"])
    graph[SAMPLER]["inputs"].update({"steps": 3, **sampler})
    return graph


def latent(**changes) -> dict:
    """The same as far as the sampler, with its latent saved."""
    graph = video(**changes)
    for node in (VAE, DECODE, VIDEO, SAVE):
        del graph[node]
    graph[SAVE] = save_latent([SAMPLER, 0])
    return graph


def heavy_latent(**changes) -> dict:
    """The same by a transformer of 101 MB, whose steps take long enough to do something meanwhile."""
    graph = latent(**changes)
    graph[MODEL]["inputs"]["model_name"] = HEAVY
    return graph


def save_latent(source: list) -> dict:
    return {"class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": "latents/test"}}


def image_without_ranks() -> dict:
    """Core nodes only: what must run whatever the ranks do."""
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    return {"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}


def refusal(server, graph: dict, node: str) -> str:
    """What ComfyUI's validation says of a node of a graph that it refuses: it says it once."""
    with pytest.raises(PromptRejected) as caught:
        server.queue(graph)
    assert list(caught.value.body["node_errors"]) == [node]
    (error,) = caught.value.body["node_errors"][node]["errors"]
    return f"{error['message']} {error['details']}"


def saved(server, prompt_id: str, node: str = SAVE) -> Path:
    """The file that an output node of a finished prompt wrote."""
    (outputs,) = [value for value in server.wait(prompt_id)["outputs"][node].values() if value != [True]]
    return server.output / outputs[0]["subfolder"] / outputs[0]["filename"]


def saved_latent(server, prompt_id: str, node: str = SAVE) -> torch.Tensor:
    return load_file(saved(server, prompt_id, node))["latent_tensor"]
