"""A family from outside of the pack, through the nodes: ComfyUI and its ranks know it by a variable."""

from pathlib import Path

import comfy_graphs
import plain_toy
import pytest
import toy_family
import torch
from ascend_runtime.models.family import TRANSFORMER
from ascend_runtime.models.registry import FAMILIES_VARIABLE
from scripts.lib.comfy_server import ComfyServer
from toy_family import files

HELPERS = Path(toy_family.__file__).resolve().parents[1]
ENVIRONMENT = {FAMILIES_VARIABLE: "toy_family", "PYTHONPATH": str(HELPERS)}
TEXTS = {comfy_graphs.POSITIVE: "a red circle moving right", comfy_graphs.NEGATIVE: "blurry"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.folder(tmp_path_factory.mktemp("comfyui_toy") / "models" / "diffusers" / "toy")


@pytest.fixture(scope="module")
def comfyui(folder):
    """One of its own: which families there are is read when the pack is loaded."""
    with ComfyServer(base=folder.parents[2], env=ENVIRONMENT) as server:
        yield server


def test_nodes_make_what_a_plain_loop_makes(comfyui):
    graph = comfy_graphs.video("toy", ranks=1, scheduler="toy", sampler_name="euler", cfg=2.0, shift=0.0, seed=5)
    graph["12"] = comfy_graphs.save_latent([comfy_graphs.SAMPLER, 0])
    for node, text in TEXTS.items():
        graph[node]["inputs"]["text"] = text
    done = comfyui.queue(graph)
    latent = comfy_graphs.saved_latent(comfyui, done, "12")
    assert comfy_graphs.saved(comfyui, done).stat().st_size > 1000
    weights, prompts = plain_toy.Weights(files.random_weights(TRANSFORMER)), map(plain_toy.prompt, TEXTS.values())
    expected = plain_toy.sampled(weights, [*prompts], latent.shape, steps=3, seed=5, scale=2.0)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-4)
