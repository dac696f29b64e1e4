"""Networks of both families as core's MODEL: text to video, image to video by each form, first frames without noise."""

from functools import partial

import hunyuan_formats
import pytest
import random_hunyuan
import tiny_llava
from safetensors.torch import save_file
from stock_graphs import Graph, apart, sampled, twins

TOLERANCE = 1e-5
TEXT = {"width": random_hunyuan.TEXT_DIM, "pooled": 768}
HUNYUAN, HUNYUAN_I2V, HUNYUAN_FOLDER = "stock_hunyuan.safetensors", "stock_hunyuan_i2v.safetensors", "stock_hunyuan"
SIZE = {"width": 64, "height": 64, "length": 9, "batch_size": 1}


@pytest.fixture(scope="module")
def networks(comfyui):
    """The `comfyui` with HunyuanVideo's transformers as ComfyUI's files, and a folder with its VAE."""
    for name, kind in ((HUNYUAN, "t2v"), (HUNYUAN_I2V, "i2v concat")):
        state = random_hunyuan.transformer(kind, **random_hunyuan.AS_CORE).state_dict()
        tensors = hunyuan_formats.comfyui_transformer(state)
        save_file(tensors, comfyui.base / "models" / "diffusion_models" / name)
    tiny_llava.save(random_hunyuan.folder(comfyui.base / "models" / "diffusers" / HUNYUAN_FOLDER))
    return comfyui


def vae(graph: Graph, base, folder: str) -> list:
    return graph.add("TestLoadCoreVae", folder=str(base / "models" / "diffusers" / folder / "vae"))


def image(graph: Graph) -> list:
    return graph.add("TestRandomImage", seed=2, frames=1, width=120, height=100)


def with_image(graph: Graph, model, base, clip: bool) -> list:
    """core's WanImageToVideo."""
    seen = {"clip_vision_output": graph.add("TestRandomClipVision", seed=4)} if clip else {}
    [node, _] = graph.add("WanImageToVideo", positive=graph.text(1), negative=graph.text(2), start_image=image(graph),
                          vae=vae(graph, base, "random_wan"), **SIZE, **seen)  # fmt: skip
    return sampled(graph, model, positive=[node, 0], negative=[node, 1], latent_image=[node, 2])


def with_first_frame(graph: Graph, model, base) -> list:
    """A latent whose first frame has a timestep of its own."""
    latent = graph.add("Wan22ImageToVideoLatent", vae=vae(graph, base, "ti2v_wan"), start_image=image(graph), **SIZE)
    return sampled(graph, model, latent_image=latent)


def test_image_to_video_with_clip(networks):
    make = partial(with_image, base=networks.base, clip=True)
    assert apart(networks, twins(make, name="original_i2v.safetensors")) <= TOLERANCE


def test_image_to_video_without_clip(networks):
    make = partial(with_image, base=networks.base, clip=False)
    assert apart(networks, twins(make, name="original_i2v_22.safetensors")) <= TOLERANCE


def test_a_first_frame_with_its_own_timestep(networks):
    make = partial(with_first_frame, base=networks.base)
    assert apart(networks, twins(make, name="original_ti2v.safetensors")) <= TOLERANCE


def texts(graph: Graph, **changes) -> dict:
    return {"positive": graph.text(1, **{**TEXT, **changes}), "negative": graph.text(3, **TEXT)}


def guided(graph: Graph, model) -> list:
    """Both guidances: cfg, and the number that the network reads."""
    given = texts(graph)
    given["positive"] = graph.add("FluxGuidance", conditioning=given["positive"], guidance=4.5)
    return sampled(graph, model, **given)


def skipping(graph: Graph, model) -> list:
    skipped = {"double_layers": "1", "single_layers": "0, 7", "start_percent": 0.0, "end_percent": 1.0}
    model = graph.add("SkipLayerGuidanceDiT", model=model, scale=2.0, rescaling_scale=0.0, **skipped)
    return sampled(graph, model, **texts(graph))


HUNYUAN_VIDEOS = {
    "one pass a step": lambda graph, model: sampled(graph, model, **texts(graph), cfg=1.0),
    "both guidances": guided,
    "texts of unequal length": lambda graph, model: sampled(graph, model, **texts(graph, tokens=33)),
    "a batch": lambda graph, model: sampled(graph, model, **texts(graph), latent_image=graph.empty(batch=2), steps=2),
    "SkipLayerGuidanceDiT": skipping,
}


@pytest.mark.parametrize("video", HUNYUAN_VIDEOS)
def test_hunyuan_video(networks, video):
    assert apart(networks, twins(HUNYUAN_VIDEOS[video], name=HUNYUAN)) <= TOLERANCE


def from_image(graph: Graph, model, base, form: str) -> list:
    """core's HunyuanImageToVideo."""
    [node, _] = graph.add("HunyuanImageToVideo", positive=graph.text(1, **TEXT), guidance_type=form, **SIZE,
                          vae=vae(graph, base, HUNYUAN_FOLDER), start_image=image(graph))  # fmt: skip
    return sampled(graph, model, positive=[node, 0], negative=graph.text(3, **TEXT), latent_image=[node, 1], cfg=1.0)


def test_hunyuan_video_from_an_image_in_further_channels(networks):
    make = partial(from_image, base=networks.base, form="v1 (concat)")
    assert apart(networks, twins(make, name=HUNYUAN_I2V)) <= TOLERANCE


def test_hunyuan_video_from_a_first_frame(networks):
    make = partial(from_image, base=networks.base, form="v2 (replace)")
    assert apart(networks, twins(make, name=HUNYUAN)) <= TOLERANCE
