"""A stock graph with two MODELs, one for the noisy steps and one for the others, as Wan 2.2's templates have them."""

import os
import signal

import comfy_graphs as graphs
import pytest
import torch
from benchmarks.opens import Opened
from rank_processes import ranks_of, seconds_until
from scripts.lib.comfy_server import PromptFailed
from stock_graphs import Graph, loaded

MODELS = ("original_wan.safetensors", "written_anew.safetensors")


def video(seed: int, **text) -> Graph:
    """Two steps by each model; the noise that is left goes from one to the other."""
    graph = Graph()
    common = {"steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "noise_seed": seed,
              "positive": graph.add("TestRandomText", **{"seed": 1, "tokens": 20, "width": 4096, "pooled": 8, **text}),
              "negative": graph.text(2)}  # fmt: skip
    high, low = (loaded(graph, ours=True, name=name) for name in MODELS)
    noisy = graph.add("KSamplerAdvanced", model=high, **common, latent_image=graph.empty(), add_noise="enable",
                      start_at_step=0, end_at_step=2, return_with_leftover_noise="enable")  # fmt: skip
    latent = graph.add("KSamplerAdvanced", model=low, **common, latent_image=noisy, add_noise="disable",
                       start_at_step=2, end_at_step=10000, return_with_leftover_noise="disable")  # fmt: skip
    graph.save("latent", latent)
    return graph


def made(comfyui, seed: int) -> torch.Tensor:
    return graphs.saved_latent(comfyui, comfyui.queue(video(seed)), "latent")


def freed(comfyui):
    comfyui.post("/free", {"unload_models": True})


def killed(comfyui):
    os.kill(ranks_of(comfyui.process.pid)[1], signal.SIGKILL)
    seconds_until(lambda: not ranks_of(comfyui.process.pid), timeout=10)


def failed(comfyui):
    with pytest.raises(PromptFailed):
        comfyui.wait(comfyui.queue(video(3, width=24)))


def test_a_second_video_opens_no_weight_file_and_both_are_the_same_after_free_a_killed_rank_and_a_failed_job(comfyui):
    first = made(comfyui, 1)
    folder = comfyui.base / "models" / "diffusion_models"
    with Opened(folder / name for name in MODELS) as watch:
        second = made(comfyui, 2)
    assert watch.files() == []
    assert (first - second).abs().max() > 0.1
    for event in (freed, killed, failed):
        event(comfyui)
        assert torch.equal(made(comfyui, 1), first), event.__name__
        assert torch.equal(made(comfyui, 2), second), event.__name__
