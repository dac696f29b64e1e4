"""A graph that samples by core ComfyUI and by ours, on the same weights, conditioning and seed."""

import comfy_graphs as graphs

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
