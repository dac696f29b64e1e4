"""A file with all networks of a model, in models/checkpoints: by Ascend Load Checkpoint (Core), and by the loaders of
one network each, it makes the video of three separate files."""

import comfy_graphs as graphs
import original_formats as formats
import pytest
import random_wan
import stock_graphs as stock
import tiny_models
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from scripts.lib.comfy_server import PromptRejected
from transformers import UMT5Config, UMT5EncoderModel

WHOLE, APART, OTHER = "wan_all_in_one.safetensors", "all_in_one_{}.safetensors", "another_model.safetensors"
CHECKPOINT = "AscendCheckpointLoaderSimple"


@pytest.fixture(scope="module")
def server(comfyui):
    """The `comfyui` with such a file, as ComfyUI saves it, and with its networks in a file each."""
    models = comfyui.base / "models"
    config = UMT5Config(vocab_size=40, d_model=random_wan.TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=2)
    encoder = tiny_models.randomise(UMT5EncoderModel(config), seed=4)
    vae = tiny_models.randomise(AutoencoderKLWan(base_dim=4), 3)
    (models / "checkpoints").mkdir(exist_ok=True)
    networks = {
        "diffusion_models": load_file(random_wan.original_transformer(models / "made", seed=5)),
        "text_encoders": formats.comfyui_umt5(encoder, formats.sentencepiece_model(), torch.float16),
        "vae": formats.original_vae(vae),
    }
    whole = {}
    for folder, tensors in networks.items():
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        save_file(tensors, models / folder / APART.format(folder))
        for name, x in tensors.items():
            prefix = {"diffusion_models": "model.diffusion_model.", "vae": "vae."}.get(folder, "text_encoders.umt5xxl.")
            inner = "transformer." if folder == "text_encoders" and name != "spiece_model" else ""
            whole[f"{prefix}{inner}{name}"] = x
    for name in (WHOLE, OTHER):
        save_file(whole, models / "checkpoints" / name)
    return comfyui


def video(graph, model, clip, vae):
    """The latent of a video that was sampled, decoded and encoded again."""
    positive, negative = (graph.add("CLIPTextEncode", clip=clip, text=text) for text in ("a red circle", "blue"))
    latent = stock.sampled(graph, model, positive=positive, negative=negative)
    frames = graph.add("VAEDecode", samples=latent, vae=vae)
    return graph.add("VAEEncode", pixels=frames, vae=vae)


def separate(graph, parallel, whole):
    """MODEL, CLIP and VAE by the loaders of one network each. whole: from the file of all of them."""
    name = (lambda folder: f"checkpoints/{WHOLE}") if whole else APART.format
    return (
        graph.add("AscendUNETLoader", unet_name=name("diffusion_models"), weight_dtype="default", parallel=parallel),
        graph.add("AscendCLIPLoader", clip_name=name("text_encoders"), type="wan", parallel=parallel),
        graph.add("AscendVAELoader", vae_name=name("vae"), parallel=parallel),
    )  # fmt: skip


def test_each_way_to_load_it_makes_the_video_of_separate_files(server):
    graph = stock.Graph()
    parallel = stock.parallel(graph, 1)
    number, _ = graph.add(CHECKPOINT, ckpt_name=WHOLE, parallel=parallel)
    graph.save("by one loader", video(graph, [number, 0], [number, 1], [number, 2]))
    graph.save("by three", video(graph, *separate(graph, parallel, whole=True)))
    graph.save("separate", video(graph, *separate(graph, parallel, whole=False)))
    prompt = server.queue(graph)
    made = {name: graphs.saved_latent(server, prompt, name) for name in ("by one loader", "by three", "separate")}
    assert made["separate"].std() > 0
    assert torch.equal(made["by one loader"], made["separate"])
    assert torch.equal(made["by three"], made["separate"])


def test_loaders_of_one_network_list_checkpoints_that_are_named_after_a_model(server):
    for loader, widget in (("AscendLoadDiffusionModel", "model_name"), ("AscendLoadVAE", "model_name"),
                           ("AscendLoadTextEncoder", "model_name"), ("AscendCLIPLoader", "clip_name")):  # fmt: skip
        names = server.get(f"/object_info/{loader}")[loader]["input"]["required"][widget][1]["options"]
        assert f"checkpoints/{WHOLE}" in names and f"checkpoints/{OTHER}" not in names, loader


def test_a_checkpoint_that_is_not_there(server):
    graph = stock.Graph()
    model = graph.add(CHECKPOINT, ckpt_name="none.safetensors", parallel=stock.parallel(graph, 1))
    graph.save("latent", stock.sampled(graph, model))
    with pytest.raises(PromptRejected, match=f"no checkpoint 'none.safetensors'.*{WHOLE}"):
        server.queue(graph)
