"""Each shipped workflow runs whole in the real ComfyUI, on small models under the names that it asks for."""

import av
import comfy_graphs as graphs
import numpy as np
import published_models
import pytest
from PIL import Image
from test_workflows import NAMES, api

SMALL = {"width": 96, "height": 64, "length": 9}
SIZED = ("EmptyHunyuanLatentVideo", "AscendImageToVideo")


@pytest.fixture(scope="module")
def published(comfyui):
    """The `comfyui` with the published models, and the image that comes with any ComfyUI."""
    published_models.write_all(comfyui.base / "models")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(comfyui.base / "input" / "example.png")
    return comfyui


def made_small(graph: dict) -> dict:
    """The graph with another size and few steps, and not changed otherwise."""
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in SIZED:
            inputs |= SMALL
        if node["class_type"] == "AscendSampler":
            inputs["steps"] = inputs["steps"] if 0 < inputs["steps"] < 5 else 2
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_runs_whole(published, name):
    graph = made_small(api(name))
    file = graphs.saved(published, published.queue(graph))
    with av.open(str(file)) as container:
        rate = container.streams.video[0].average_rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert file.name.startswith(graph["11"]["inputs"]["filename_prefix"].removeprefix("video/"))
    assert frames.shape == (SMALL["length"], SMALL["height"], SMALL["width"], 3)
    assert rate == graph["10"]["inputs"]["fps"]
    assert frames[0].std() > 1 and (frames[1:] != frames[:-1]).any(axis=(1, 2, 3)).all(), "it shows nothing"
