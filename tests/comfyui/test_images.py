"""Image to video in the real ComfyUI: our node's conditioning is that of core's nodes, and so is what comes of it."""

import comfy_graphs as graphs
import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec
from ascend_runtime.components import Components
from scripts.lib.comfy_server import PromptFailed, PromptRejected
from safetensors.torch import load_file
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-3, "rtol": 0.0}
SIZE = {"width": 96, "height": 64, "length": 9, "batch_size": 1}
TI2V = "ti2v_wan"
CORE, OURS, SAVED = "core", "ours", "saved_"  # nodes, and prefix of those that save what these made
INPUTS = {  # of our node: (class, its inputs)
    "start_image": ("TestRandomImage", {"seed": 1, "frames": 1, "width": 120, "height": 100}),
    "end_image": ("TestRandomImage", {"seed": 2, "frames": 1, "width": 64, "height": 128}),
    "clip_vision_output": ("TestRandomClipVision", {"seed": 3}),
    "clip_vision_end_output": ("TestRandomClipVision", {"seed": 4}),
}
CORES_NAMES = {"clip_vision_output": "clip_vision_start_image", "clip_vision_end_output": "clip_vision_end_image"}


def prepared(comfyui, core_node: str, inputs: dict, vae: str = graphs.RANDOM, **size) -> dict:
    """A graph in which a core node and ours are given the same: `inputs` has changes of INPUTS by name."""
    graph = {key: node for key, node in graphs.latent().items() if key in (graphs.PARALLEL, graphs.ENCODER)}
    graph[graphs.ENCODER]["inputs"]["model_name"] = "wide_text_encoder"
    for node, text in ((graphs.POSITIVE, "a red ball"), (graphs.NEGATIVE, "")):
        graph[node] = {"class_type": "AscendTextEncode", "inputs": {"text_encoder": [graphs.ENCODER, 0], "text": text}}
    loader = {"model_name": vae, "dtype": "auto", "parallel": [graphs.PARALLEL, 0]}
    graph[graphs.VAE] = {"class_type": "AscendLoadVAE", "inputs": loader}
    folder = str(comfyui.base / "models" / "diffusers" / vae / "vae")
    graph["core_vae"] = {"class_type": "TestLoadCoreVae", "inputs": {"folder": folder}}
    links = {}
    for name, changes in inputs.items():
        kind, values = INPUTS[name]
        graph[name] = {"class_type": kind, "inputs": {**values, **changes}}
        links[name] = [name, 0]
    texts = {"positive": [graphs.POSITIVE, 0], "negative": [graphs.NEGATIVE, 0]}
    size = {**SIZE, **size}
    graph[OURS] = {"class_type": "AscendImageToVideo", "inputs": {**texts, **size, **links, "vae": [graphs.VAE, 0]}}
    if core_node == "WanFirstLastFrameToVideo":
        links = {CORES_NAMES.get(name, name): link for name, link in links.items()}
    if core_node == "Wan22ImageToVideoLatent":
        texts = {}
    graph[CORE] = {"class_type": core_node, "inputs": {**texts, **size, **links, "vae": ["core_vae", 0]}}
    return graph


def held(comfyui, graph: dict) -> tuple[dict, dict]:
    """What the core node's and our node's positive, negative and latent hold, by name."""
    for node in (CORE, OURS):
        outputs = {"latent": 2, "positive": 0, "negative": 1}
        if graph[node]["class_type"] == "Wan22ImageToVideoLatent":
            outputs = {"latent": 0}
        for name, output in outputs.items():
            kind = "latent" if name == "latent" else "conditioning"
            graph[f"{SAVED}{node}_{name}"] = {"class_type": "TestSave", "inputs": {kind: [node, output]}}
    prompt = comfyui.queue(graph)
    files = {key: graphs.saved(comfyui, prompt, key) for key in graph if key.startswith(SAVED)}
    sides = {CORE: {}, OURS: {}}
    for key, file in files.items():
        side, name = key.removeprefix(SAVED).split("_")
        sides[side] |= {f"{name} {part}": tensor for part, tensor in load_file(file).items()}
    return sides[CORE], sides[OURS]


@pytest.mark.parametrize("core_node, inputs, size", [
    ("WanImageToVideo", {}, {}),
    ("WanImageToVideo", {"start_image": {}}, {}),
    ("WanImageToVideo", {"start_image": {"frames": 6}, "clip_vision_output": {}}, {"batch_size": 2}),
    ("WanImageToVideo", {"start_image": {"frames": 12}}, {}),
    ("WanFirstLastFrameToVideo", {"start_image": {}, "end_image": {}, "clip_vision_output": {},
                                  "clip_vision_end_output": {}}, {}),
    ("WanFirstLastFrameToVideo", {"start_image": {"frames": 3}, "end_image": {"frames": 2}}, {"length": 13}),
    ("WanFirstLastFrameToVideo", {"end_image": {}, "clip_vision_end_output": {}}, {}),
])  # fmt: skip
def test_conditioning_is_that_of_core(comfyui, core_node, inputs, size):
    core, ours = held(comfyui, prepared(comfyui, core_node, inputs, **size))
    assert core.keys() == ours.keys() and {"positive text", "negative text", "latent samples"} <= core.keys()
    assert ("positive concat_mask" in core) == ("start_image" in inputs or "end_image" in inputs)
    assert ("negative clip_vision_output" in core) == any("clip" in name for name in inputs)
    for name, expected in core.items():
        got = ours[name]
        if name.endswith("concat_mask"):  # one channel says the same as four
            expected, got = (mask.expand(-1, 4, -1, -1, -1) for mask in (expected, got))
        assert_close(got, expected, **TOLERANCE, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("frames, batch_size", [(0, 1), (1, 2), (7, 1)])
def test_a_latent_of_wan_22_is_that_of_core(comfyui, frames, batch_size):
    inputs = {"start_image": {"frames": frames}} if frames else {}
    graph = prepared(comfyui, "Wan22ImageToVideoLatent", inputs, vae=TI2V, batch_size=batch_size)
    core, ours = held(comfyui, graph)
    parts = {"latent samples", "latent noise_mask"} if frames else {"latent samples"}
    assert core.keys() == parts and parts <= ours.keys()
    for name in parts:
        expected = core[name].expand(batch_size, -1, -1, -1, -1)  # core makes one where there is no image
        assert_close(ours[name], expected, **TOLERANCE)


@pytest.mark.parametrize("vae, frames, width, height", [(graphs.RANDOM, 6, 77, 68), (TI2V, 4, 81, 64)])
def test_frames_of_an_odd_size_are_encoded_as_by_core(comfyui, vae, frames, width, height):
    graph = prepared(comfyui, "WanImageToVideo", {}, vae=vae)
    pixels = {"seed": 6, "frames": frames, "width": width, "height": height}
    graph["pixels"] = {"class_type": "TestRandomImage", "inputs": pixels}
    for name, kind, loader in ((CORE, "VAEEncode", "core_vae"), (OURS, "AscendVAEEncode", graphs.VAE)):
        graph[name] = {"class_type": kind, "inputs": {"pixels": ["pixels", 0], "vae": [loader, 0]}}
        graph[f"{SAVED}{name}"] = graphs.save_latent([name, 0])
    prompt = comfyui.queue(graph)
    core, ours = (graphs.saved_latent(comfyui, prompt, f"{SAVED}{name}") for name in (CORE, OURS))
    assert_close(ours, core, **TOLERANCE)


def sampled(graph: dict, model: str, our_model: str | None = None, **inputs) -> dict:
    """Adds core's sampler on core's conditioning, and ours on both, each with its latent saved."""
    settings = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    graph["unet"] = {"class_type": "UNETLoader", "inputs": {"unet_name": model, "weight_dtype": "default"}}
    graph["shifted"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["unet", 0], "shift": 5.0}}
    graph["model"] = graphs.latent()[graphs.MODEL]
    graph["model"]["inputs"]["model_name"] = our_model or model

    def add(name, kind, conditioned, **more):
        links = {"positive": [conditioned, 0], "negative": [conditioned, 1], "latent_image": [conditioned, 2]}
        if graph[conditioned]["class_type"] == "Wan22ImageToVideoLatent":  # which passes no text on
            links = {"positive": [graphs.POSITIVE, 0], "negative": [graphs.NEGATIVE, 0], "latent_image": [CORE, 0]}
        graph[name] = {"class_type": kind, "inputs": {**settings, **links, **more, **inputs}}
        graph[f"{SAVED}{name}"] = graphs.save_latent([name, 0])

    add("core by core", "KSampler", CORE, model=["shifted", 0], denoise=1.0)
    add("core by ours", "AscendSampler", CORE, model=["model", 0], shift=5.0)
    add("ours by ours", "AscendSampler", OURS, model=["model", 0], shift=5.0)
    return graph


def assert_same_latents(comfyui, graph: dict) -> None:
    """Core's nodes and sampler, core's nodes and our sampler, our node and sampler."""
    prompt = comfyui.queue(graph)
    core, mixed, ours = (
        graphs.saved_latent(comfyui, prompt, f"{SAVED}{by}") for by in ("core by core", "core by ours", "ours by ours")
    )
    print(f"at most {(mixed - core).abs().max():.1e} and {(ours - core).abs().max():.1e} apart")
    assert core.std() > 0.1
    assert_close(mixed, core, **TOLERANCE)
    assert_close(ours, core, **TOLERANCE)


@pytest.mark.parametrize("model, core_node, inputs", [
    ("original_i2v.safetensors", "WanImageToVideo", {"start_image": {}, "clip_vision_output": {}}),
    ("original_i2v_22.safetensors", "WanFirstLastFrameToVideo", {"start_image": {}, "end_image": {}}),
    ("original_i2v_22.safetensors", "WanImageToVideo", {}),
])  # fmt: skip
def test_whole_graphs_give_core_samplers_latent(comfyui, model, core_node, inputs):
    assert_same_latents(comfyui, sampled(prepared(comfyui, core_node, inputs), model))


@pytest.mark.parametrize("masked", [False, True], ids=["first frame", "half of each frame"])
def test_whole_graphs_of_ti2v_give_core_samplers_latent(comfyui, masked):
    """What is known of a frame lowers the timestep of all its tokens, in core and here."""
    start = {"start_image": {"frames": 9 if masked else 1}}
    graph, inputs = prepared(comfyui, "Wan22ImageToVideoLatent", start, vae=TI2V), {}
    if masked:
        graph |= half_masked([OURS, 2])
        inputs = {"latent_image": ["masked", 0]}
    assert_same_latents(comfyui, sampled(graph, "original_ti2v.safetensors", TI2V, **inputs))


def half_masked(latent: list) -> dict:
    """Nodes of which "masked" gives a latent whose left half is known."""
    return {
        "half": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 48, "height": 64}},
        "whole": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 96, "height": 64}},
        "mask": {
            "class_type": "MaskComposite",
            "inputs": {"destination": ["whole", 0], "source": ["half", 0], "x": 0, "y": 0, "operation": "multiply"},
        },
        "masked": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": latent, "mask": ["mask", 0]}},
    }


def test_a_masked_latent_is_filled_as_by_core(comfyui):
    """A text-to-video model: what the mask leaves out is given to the network under noise, and stays."""
    graph = prepared(comfyui, "WanImageToVideo", {})
    pixels = {"class_type": "TestRandomImage", "inputs": {"seed": 6, "frames": 9, "width": 96, "height": 64}}
    graph |= {
        "pixels": pixels,
        "encoded": {"class_type": "AscendVAEEncode", "inputs": {"pixels": ["pixels", 0], "vae": [graphs.VAE, 0]}},
    }
    graph |= half_masked(["encoded", 0])
    sampled(graph, "original_wan.safetensors", latent_image=["masked", 0])
    graph["given"] = graphs.save_latent(["encoded", 0])
    prompt = comfyui.queue(graph)
    core, ours, given = (
        graphs.saved_latent(comfyui, prompt, node) for node in (f"{SAVED}core by core", f"{SAVED}ours by ours", "given")
    )
    assert_close(ours, core, **TOLERANCE)
    assert_close(ours[..., :5], given[..., :5], **TOLERANCE)
    assert (ours[..., 7:] - given[..., 7:]).abs().max() > 0.1


def test_a_size_that_does_not_fit_is_refused(comfyui):
    with pytest.raises(PromptRejected, match="4n\\+1"):
        comfyui.queue(held_by_ours(prepared(comfyui, "WanImageToVideo", {}, length=8)))
    graph = held_by_ours(prepared(comfyui, "WanImageToVideo", {}, vae=TI2V, width=80))
    with pytest.raises(PromptFailed, match="width is 80; with this VAE it must be a multiple of 32.*64 and 96"):
        comfyui.wait(comfyui.queue(graph))


def test_an_end_image_with_the_vae_of_wan_22_is_refused(comfyui):
    graph = held_by_ours(prepared(comfyui, "WanImageToVideo", {"end_image": {}}, vae=TI2V))
    with pytest.raises(PromptFailed, match="take only a start_image. Disconnect end_image"):
        comfyui.wait(comfyui.queue(graph))


@pytest.mark.parametrize("image, shape", [
    ({"colours": 2}, [1, 100, 120, 2]), ({"frames": 0}, [0, 100, 120, 3])
], ids=str)  # fmt: skip
def test_an_image_without_colours_or_frames_is_refused(comfyui, image, shape):
    graph = held_by_ours(prepared(comfyui, "WanImageToVideo", {"start_image": image}))
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(graph))
    assert caught.value.details["exception_type"] == "ValueError"
    assert f"start_image has the shape {shape}; an IMAGE is [images, " in caught.value.details["exception_message"]


def held_by_ours(graph: dict) -> dict:
    del graph[CORE]
    graph["saved"] = {"class_type": "TestSave", "inputs": {"latent": [OURS, 2]}}
    return graph


@pytest.mark.parametrize("name, channels", [("Wan21", 16), ("Wan22", 48)])
def test_latents_of_a_single_file_are_normalised_and_pictured_as_by_core(tmp_path, name, channels):
    file = random_wan.original_transformer(tmp_path / "wan", layers=1, channels=channels, out_channels=channels)
    model = Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(file)), lambda *_: None)
    core = random_wan.core_latent_format(name)
    latents = model.latents
    assert torch.equal(latents.mean, core.latents_mean) and torch.equal(latents.std, core.latents_std)
    assert torch.equal(torch.tensor(latents.format.rgb), torch.tensor(core.latent_rgb_factors))
    assert torch.equal(torch.tensor(latents.format.rgb_bias), torch.tensor(core.latent_rgb_factors_bias))
