"""HunyuanVideo's image-to-video models in stock graphs make the latents that they make on core's own loader."""

import hunyuan_formats
import pytest
import random_hunyuan
from safetensors.torch import save_file
from scripts.lib.comfy_server import PromptFailed
from stock_graphs import Graph, apart, sampled, twins

TOLERANCE = 1e-4
KINDS = {"v1 (concat)": "i2v concat", "v2 (replace)": "t2v", "custom": "t2v"}  # of models, by core's guidance_type


@pytest.fixture(scope="module")
def server(comfyui):
    """The `comfyui` with HunyuanVideo's transformers, and a VAE that core's nodes take."""
    models = comfyui.base / "models"
    for seed, kind in enumerate(set(KINDS.values())):
        state = random_hunyuan.transformer(kind, seed, **random_hunyuan.AS_CORE).state_dict()
        save_file(hunyuan_formats.comfyui_transformer(state), models / "diffusion_models" / name_of(kind))
    random_hunyuan.vae().save_pretrained(models / "small_hunyuan_vae")
    return comfyui


def name_of(kind: str) -> str:
    return f"stock_hunyuan_{kind}.safetensors"


def from_an_image(server, guidance_type: str):
    """(graph, MODEL) -> LATENT: by core's image-to-video node, with two texts of unequal lengths."""

    def make(graph: Graph, model: list) -> list:
        def text(seed: int, tokens: int) -> list:
            return graph.add("TestRandomText", seed=seed, tokens=tokens, width=random_hunyuan.TEXT_DIM, pooled=768)

        made = graph.add(
            "HunyuanImageToVideo",
            positive=graph.add("FluxGuidance", conditioning=text(1, 7), guidance=7.5),
            vae=graph.add("TestLoadCoreVae", folder=str(server.base / "models" / "small_hunyuan_vae")),
            start_image=graph.add("TestRandomImage", seed=1, frames=1, width=64, height=48),
            width=64,
            height=48,
            length=9,
            batch_size=1,
            guidance_type=guidance_type,
        )
        return sampled(graph, model, positive=made, negative=text(2, 5), latent_image=[made[0], 1])

    return make


@pytest.mark.parametrize("guidance_type, ranks", [("v1 (concat)", 2), ("v2 (replace)", 2), ("v2 (replace)", 1)])
def test_a_video_from_an_image_is_that_of_cores_loader(server, guidance_type, ranks):
    make, name = from_an_image(server, guidance_type), name_of(KINDS[guidance_type])
    assert apart(server, twins(make, ranks, name)) <= TOLERANCE


def test_a_reference_latent_is_refused_by_name(server):
    graph = twins(from_an_image(server, "custom"), name=name_of(KINDS["custom"]))
    del graph["core"]
    with pytest.raises(PromptFailed) as caught:
        server.wait(server.queue(graph))
    error = caught.value.details["exception_message"]
    assert caught.value.details["exception_type"] == "ValueError"
    assert "ref_latent" in error and "Choose v1 (concat)" in error, error
