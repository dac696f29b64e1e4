"""Core ComfyUI's own sampler and ours, on the same weights, conditioning and seed, in the same ComfyUI."""

import comfy_graphs as graphs
import pytest
from benchmarks.opens import Opened
from core_twin import MODEL, TOLERANCE, both


@pytest.mark.parametrize("steps, cfg, shift", [(6, 4.0, 5.0), (4, 1.0, 8.0)])
def test_the_stock_graph_and_ours_give_the_same_latent(comfyui, steps, cfg, shift):
    prompt = comfyui.queue(both(steps, cfg, shift, seed=3))
    core, ours = (graphs.saved_latent(comfyui, prompt, node) for node in ("core", "ours"))
    error = (core - ours).abs().max().item()
    print(f"{steps} steps, cfg {cfg}, shift {shift}: at most {error:.1e} apart, their deviation is {core.std():.2f}")
    assert core.shape == ours.shape == (1, 16, 3, 8, 8)
    assert error <= TOLERANCE


def test_weights_text_and_guidance_all_show_in_the_latent(comfyui):
    """Equal latents prove little if the network's part in them were nothing."""
    one = graphs.saved_latent(comfyui, comfyui.queue(both(4, 1.0, 5.0, seed=3)), "core")
    guided = graphs.saved_latent(comfyui, comfyui.queue(both(4, 4.0, 5.0, seed=3)), "core")
    assert (one - guided).abs().max() > 100 * TOLERANCE


def test_a_loaded_file_is_not_opened_again(comfyui):
    """Its config is read off its header, which is no reason to open it in every job."""
    opened = []
    for seed in (1, 2):
        graph = both(1, 1.0, 5.0, seed)
        for node in ("20", "21", "22", "core"):
            del graph[node]
        with Opened([comfyui.base / "models" / "diffusion_models" / MODEL]) as watch:
            comfyui.wait(comfyui.queue(graph))
        opened.append(watch.files())
    assert opened[1] == []
