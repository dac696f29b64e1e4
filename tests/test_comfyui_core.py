"""Core ComfyUI's own sampler and ours, on the same weights, conditioning and seed, in the same ComfyUI."""

import comfy_graphs as graphs
import pytest
from benchmarks.opens import Opened

MODEL = "original_wan.safetensors"
TOLERANCE = 1e-3


def both(steps: int, cfg: float, shift: float, seed: int) -> dict:
    """A graph whose text goes through UNETLoader, ModelSamplingSD3 and KSampler ("core"), and through ours ("ours")."""
    graph = graphs.latent(seed=seed, steps=steps, cfg=cfg, shift=shift, sampler_name="euler", scheduler="simple")
    graph[graphs.MODEL]["inputs"]["model_name"] = MODEL
    graph[graphs.ENCODER]["inputs"]["model_name"] = "wide_text_encoder"
    loader = {"unet_name": MODEL, "weight_dtype": "default"}
    sampler = {"seed": seed, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"positive": [graphs.POSITIVE, 0], "negative": [graphs.NEGATIVE, 0], "latent_image": [graphs.EMPTY, 0]}
    graph["20"] = {"class_type": "UNETLoader", "inputs": loader}
    graph["21"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["20", 0], "shift": shift}}
    graph["22"] = {"class_type": "KSampler", "inputs": {"model": ["21", 0], **sampler, **links}}
    graph["core"] = graphs.save_latent(["22", 0])
    graph["ours"] = graph.pop(graphs.SAVE)
    return graph


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
