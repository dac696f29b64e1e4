"""Core's VAE type on the ranks: core's own nodes make of it what they make of core's VAE of the same file."""

import os
import signal

import comfy_graphs as graphs
import hunyuan_formats
import original_formats
import pytest
import random_hunyuan
import tiny_models
import torch
from scripts.lib.comfy_server import PromptFailed
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from rank_processes import mapped_at, ranks_of, seconds_until
from torch.testing import assert_close

TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}
FILES = {"wan 2.1": "stock_vae.safetensors", "wan 2.2": "stock_vae_22.safetensors",
         "hunyuan": "stock_hunyuan.safetensors"}  # fmt: skip
RANKS = "ranks"
SIZE = {"width": 96, "height": 64, "length": 9, "batch_size": 1}


@pytest.fixture(scope="module")
def files(comfyui):
    """The `comfyui` with small VAEs, as core's loader reads them."""
    folder = comfyui.base / "models" / "vae"
    nested = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, in_channels=12, out_channels=12, patch_size=2, is_residual=True,
        scale_factor_spatial=16,
    )  # fmt: skip
    networks = {"wan 2.1": AutoencoderKLWan(base_dim=4), "wan 2.2": nested}
    for name, network in networks.items():
        tensors = original_formats.original_vae(tiny_models.randomise(network, 3))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILES[name])
    tensors = hunyuan_formats.comfyui_vae(random_hunyuan.vae().state_dict())
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / FILES["hunyuan"])
    return comfyui


def loaded(kind: str, ranks: int = 2) -> dict:
    """A graph with core's VAE of a file, "core", and ours, "ours"."""
    core = "VAELoader" if kind == "wan 2.1" else "TestLoadSmallCoreVae"
    parallel = graphs.video(ranks=ranks)[graphs.PARALLEL]
    return {
        RANKS: parallel,
        "core": {"class_type": core, "inputs": {"vae_name": FILES[kind]}},
        "ours": {"class_type": "AscendVAELoader", "inputs": {"vae_name": FILES[kind], "parallel": [RANKS, 0]}},
    }


def with_both(graph: dict, name: str, node: str, output: int, kind: str, **inputs) -> None:
    """Adds a core node for each VAE, and saves that output, a "latent", a "conditioning" or "images". Inputs that name
    the node `{vae}` mean the one of the same VAE."""
    for vae in ("core", "ours"):
        own = {key: [link[0].format(vae=vae), link[1]] if isinstance(link, list) else link
               for key, link in inputs.items()}  # fmt: skip
        graph[f"{name} {vae}"] = {"class_type": node, "inputs": {"vae": [vae, 0], **own}}
        graph[f"saved {name} {vae}"] = {"class_type": "TestSave", "inputs": {kind: [f"{name} {vae}", output]}}


def image(seed: int, frames: int, width: int, height: int, colours: int = 3) -> dict:
    shape = {"seed": seed, "frames": frames, "width": width, "height": height, "colours": colours}
    return {"class_type": "TestRandomImage", "inputs": shape}


def assert_alike(comfyui, graph: dict) -> None:
    """Core's and ours are equal, whatever is saved."""
    prompt = comfyui.queue(graph)
    names = [name.removeprefix("saved ").removesuffix(" core") for name in graph
             if name.startswith("saved ") and name.endswith(" core")]  # fmt: skip
    assert names
    for name in names:
        core, ours = (load_file(graphs.saved(comfyui, prompt, f"saved {name} {vae}")) for vae in ("core", "ours"))
        assert core.keys() == ours.keys() and core
        for key, expected in core.items():
            print(f"{name} {key}: at most {(ours[key] - expected).abs().max():.1e} apart, std {expected.std():.2f}")
            assert_close(ours[key], expected, **TOLERANCE, msg=lambda said, key=key: f"{name} {key}: {said}")


@pytest.mark.parametrize("kind, ranks", [("wan 2.1", 2), ("wan 2.2", 2), ("hunyuan", 2), ("wan 2.1", 1)])
def test_cores_nodes_encode_and_decode_as_with_cores_vae(files, kind, ranks, request):
    """Odd sizes, more frames than 4n+1 and RGBA are cropped alike; tiles as large as the video change nothing."""
    if ranks == 1 and not request.config.getoption("--all-stock"):
        pytest.skip("other numbers of ranks: --all-stock")
    graph = loaded(kind, ranks)
    graph["video"] = image(1, 7 if kind == "wan 2.1" else 5, 76, 66, colours=4)
    whole = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    with_both(graph, "encoded", "VAEEncode", 0, "latent", pixels=["video", 0])
    with_both(graph, "decoded", "VAEDecode", 0, "images", samples=["encoded core", 0])
    if kind == "wan 2.1":
        with_both(graph, "tiled latent", "VAEEncodeTiled", 0, "latent", pixels=["video", 0], **whole)
        with_both(graph, "tiled", "VAEDecodeTiled", 0, "images", samples=["encoded core", 0], **whole)
    assert_alike(files, graph)


FIRST, LAST = "first", "last"
TEXT = {"seed": 5, "tokens": 7, "width": 32, "pooled": 12}
PROMPTS = {"positive": ["text", 0], "negative": ["text", 0]}
IMAGE_NODES = {  # core's: the VAE, its inputs, its outputs by number
    "WanImageToVideo": ("wan 2.1", {**PROMPTS, "start_image": [FIRST, 0]}, {"conditioning": 0, "latent": 2}),
    "WanFirstLastFrameToVideo": (
        "wan 2.1", {**PROMPTS, "start_image": [FIRST, 0], "end_image": [LAST, 0]}, {"conditioning": 1, "latent": 2}
    ),
    "WanFunInpaintToVideo": (
        "wan 2.1", {**PROMPTS, "start_image": [FIRST, 0], "end_image": [LAST, 0]}, {"conditioning": 0}
    ),
    "Wan22ImageToVideoLatent": ("wan 2.2", {"start_image": [FIRST, 0]}, {"latent": 0}),
    "HunyuanImageToVideo": (
        "hunyuan", {"positive": ["text", 0], "start_image": [FIRST, 0], "guidance_type": "v1 (concat)"},
        {"conditioning": 0, "latent": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("node", IMAGE_NODES)
def test_cores_image_to_video_nodes_condition_as_with_cores_vae(files, node):
    kind, inputs, outputs = IMAGE_NODES[node]
    graph = loaded(kind) | {FIRST: image(1, 1, 120, 100), LAST: image(2, 1, 64, 128)}
    graph["text"] = {"class_type": "TestRandomText", "inputs": TEXT}
    for what, output in outputs.items():
        with_both(graph, what, node, output, what, **SIZE, **inputs)
    assert_alike(files, graph)


def ours(kind: str) -> dict:
    graph = loaded(kind)
    del graph["core"]
    return graph


def test_cores_decoded_image_is_the_ranks_memory(files):
    graph = ours("wan 2.1")
    graph["empty"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {**SIZE, "batch_size": 2}}
    graph["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["empty", 0], "vae": ["ours", 0]}}
    graph["hold"] = {"class_type": "TestHold", "inputs": {"images": ["decoded", 0]}}
    address = files.wait(files.queue(graph))["outputs"]["hold"]["address"][0]
    assert mapped_at(files.process.pid, address)[0].startswith("/memfd:ascend-frames")
    let_go = {"let go": {"class_type": "TestLetGo", "inputs": {"seed": address}}}
    held = load_file(graphs.saved(files, files.queue(let_go), "let go"))["images"]
    assert held.shape == (17, 64, 96, 3)
    assert torch.equal(held[:8], held[9:])  # of two equal videos, from the second frame on


def test_a_vae_of_the_ranks_is_not_saved(files):
    """And without the node that saves it, the graph runs."""
    graph = ours("wan 2.1")
    graph["save"] = {"class_type": "VAESave", "inputs": {"vae": ["ours", 0], "filename_prefix": "vae"}}
    graph["video"] = image(1, 5, 64, 64)
    graph["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["video", 0], "vae": ["ours", 0]}}
    graph["latent"] = graphs.save_latent(["encoded", 0])
    with pytest.raises(PromptFailed) as caught:
        files.wait(files.queue(graph))
    assert caught.value.details["node_type"] == "VAESave"
    assert "The VAE of Ascend Load VAE (Core) cannot be saved here" in caught.value.details["exception_message"]
    del graph["save"]
    assert graphs.saved_latent(files, files.queue(graph), "latent").shape == (1, 16, 2, 8, 8)


def test_what_else_core_lists_is_refused_by_name(files):
    graph = ours("wan 2.1")
    graph["ours"]["inputs"]["vae_name"] = "pixel_space"
    graph["preview"] = {"class_type": "VAEDecode", "inputs": {"samples": ["empty", 0], "vae": ["ours", 0]}}
    graph["empty"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": SIZE}
    graph["hold"] = {"class_type": "PreviewImage", "inputs": {"images": ["preview", 0]}}
    said = graphs.refusal(files, graph, "ours")
    assert "The ranks cannot run the VAE pixel_space. Load it with core's Load VAE" in said


@pytest.mark.parametrize("kind", FILES)
def test_what_nodes_read_of_a_vae_is_that_of_cores(files, kind):
    """What is in the ranks is missing, with a text that says so."""
    graph = loaded(kind)
    for vae in ("core", "ours"):
        graph[f"{vae} facts"] = {"class_type": "TestVaeFacts", "inputs": {"vae": [vae, 0]}}
    outputs = files.wait(files.queue(graph))["outputs"]
    (core,), (ours,), (missing,) = (outputs["core facts"]["facts"], outputs["ours facts"]["facts"],
                                    outputs["ours facts"]["missing"])  # fmt: skip
    assert ours == {name: fact for name, fact in core.items() if name not in missing}
    assert "decoder" in core and "decoder" in missing


def test_decoding_survives_freed_memory_and_a_killed_rank(files, request):
    """The rank is killed with --all-stock."""
    graph = ours("wan 2.1")
    graph["video"] = image(4, 5, 64, 64)
    graph["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["video", 0], "vae": ["ours", 0]}}
    graph["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["encoded", 0], "vae": ["ours", 0]}}
    graph["save"] = {"class_type": "TestSave", "inputs": {"images": ["decoded", 0]}}
    made = [load_file(graphs.saved(files, files.queue(graph), "save"))["images"]]
    files.post("/free", {"unload_models": True, "free_memory": False})
    graph["video"]["inputs"]["colours"] = 4  # other numbers, so that nothing is known
    made.append(load_file(graphs.saved(files, files.queue(graph), "save"))["images"])
    if request.config.getoption("--all-stock"):
        os.kill(ranks_of(files.process.pid)[1], signal.SIGKILL)
        seconds_until(lambda: not ranks_of(files.process.pid), timeout=10)
    files.post("/free", {"unload_models": True, "free_memory": False})
    graph["video"]["inputs"]["colours"] = 3
    made.append(load_file(graphs.saved(files, files.queue(graph), "save"))["images"])
    assert torch.equal(made[2], made[0]) and not torch.equal(made[1], made[0])
