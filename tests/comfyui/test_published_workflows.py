"""Each shipped workflow runs whole in the real ComfyUI, on small models under the names that it asks for."""

import av
import comfy_graphs as graphs
import numpy as np
import published_hunyuan
import published_models
import pytest
from ascend_runtime.commands.downloading.options import files_by_name
from PIL import Image
from shipped_workflows import NAMES, api

SMALL = {"width": 96, "height": 64, "length": 9}
SIZED = ("EmptyHunyuanLatentVideo", "AscendImageToVideo", "WanImageToVideo", "Wan22ImageToVideoLatent")
CUT = "ImageFromBatch"  # drops the first frames
WIDGETS = ("model_name", "low_noise_model_name", "model_name_2", "vision_model_name", "lora_name",
           "low_noise_lora_name", "unet_name",
           "clip_name", "clip_name1", "clip_name2", "vae_name")  # fmt: skip


@pytest.fixture(scope="module")
def published(comfyui):
    """The `comfyui` with the published models, and the image that comes with any ComfyUI."""
    published_models.write_all(comfyui.base / "models")
    published_hunyuan.write_all(comfyui.base / "models")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(comfyui.base / "input" / "example.png")
    return comfyui


def made_small(graph: dict) -> dict:
    """The graph with another size and few steps, and not changed otherwise."""
    few = any(node["inputs"].get("few_steps") for node in graph.values())  # then the model's default is 4 steps
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in SIZED:
            inputs |= {name: value for name, value in SMALL.items() if not isinstance(inputs[name], list)}
        if node["class_type"] == "AscendVideoSize":
            seconds = (SMALL["length"] - 1) / inputs["fps"]
            inputs |= {"width": SMALL["width"], "height": SMALL["height"], "seconds": seconds}
        if node["class_type"] == "AscendSampler" and not few:
            inputs["steps"] = inputs["steps"] if 0 < inputs["steps"] < 5 else 2
        if node["class_type"].startswith("KSampler"):
            inputs["steps"] = 2
        if node["class_type"] == "KSamplerAdvanced":
            inputs |= {"end_at_step": 1} if inputs["start_at_step"] == 0 else {"start_at_step": 1}
    return graph


def rate_of(graph: dict) -> float:
    """Frames per second: Create Video's own, or those that a link from Ascend Video Size brings."""
    rate = graph["10"]["inputs"]["fps"]
    return graph[rate[0]]["inputs"]["fps"] if isinstance(rate, list) else rate


@pytest.mark.parametrize("name", NAMES)
def test_runs_whole(published, name):
    graph = made_small(api(name))
    file = graphs.saved(published, published.queue(graph))
    with av.open(str(file)) as container:
        rate = container.streams.video[0].average_rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert file.name.startswith(graph["11"]["inputs"]["filename_prefix"].removeprefix("video/"))
    dropped = sum(node["inputs"]["batch_index"] for node in graph.values() if node["class_type"] == CUT)
    assert dropped == (4 if "_v1_" in name else 0)
    assert frames.shape == (SMALL["length"] - dropped, SMALL["height"], SMALL["width"], 3)
    assert rate == rate_of(graph)
    assert frames[0].std() > 1 and (frames[1:] != frames[:-1]).any(axis=(1, 2, 3)).all(), "it shows nothing"


def test_the_switch_makes_the_workflow_that_it_replaced(published):
    """The node that switches to few steps, with a sampler on auto, against two LoRA nodes and a sampler with each value
    set; and switched off, it needs no LoRA."""
    made = []
    for name in ("wan2.2_i2v_a14b_image_to_video", "wan2.2_i2v_a14b_image_to_video_4_steps"):
        graph = api(name)
        if name == "wan2.2_i2v_a14b_image_to_video":
            graph["17"]["inputs"]["few_steps"] = True
        graph = made_small(graph)
        graph["11"] = graphs.save_latent(["8", 0])
        del graph["9"], graph["10"]
        made.append(graphs.saved_latent(published, published.queue(graph), "11"))
    assert made[0].std() > 0.1 and (made[0] - made[1]).abs().max() < 1e-4 * made[0].abs().max()


MODELS = [
    (name, number, key)
    for name in NAMES
    for number, node in api(name).items()
    if node["class_type"].startswith("Ascend")  # core's own loaders refuse in their own words
    for key in WIDGETS
    if node["inputs"].get(key, "none") != "none" and not name.startswith("tiny_wan")
    and node["inputs"].get("few_steps", True)  # else the LoRAs need not be there
]


@pytest.mark.parametrize("name, number, key", MODELS)
def test_a_missing_model_is_refused_with_where_it_can_be_had(published, name, number, key):
    graph = api(name)
    file = graph[number]["inputs"][key]
    missing = graph[number]["inputs"][key] = f"missing_{file}"
    said = graphs.refusal(published, graph, number)
    place, folder = files_by_name()[file].repository[:16], files_by_name()[file].folder
    for part in (f"There is no model {missing!r}", place, "from Hugging Face or ModelScope", folder):
        assert part in said
