"""The loaders list what lies in ComfyUI's folders, whoever wrote it, and a graph of such models makes a video."""

import itertools

import comfy_graphs as graphs
import gguf_files
import pytest
from safetensors.torch import load_file

KINDS = {graphs.MODEL: "AscendLoadDiffusionModel", graphs.ENCODER: "AscendLoadTextEncoder", graphs.VAE: "AscendLoadVAE"}
FOLDERS = {"random_wan", "heavy_wan", "wide_text_encoder", "original_folder", "embedded/tiny_wan"}
FILES = {
    graphs.MODEL: {"original_wan.safetensors", "written_anew.safetensors"},
    graphs.ENCODER: {"umt5.safetensors"},
    graphs.VAE: {"wan_vae.pth"},
}


def test_each_loader_lists_folders_and_its_own_files(comfyui):
    for node, name in KINDS.items():
        _, options = comfyui.get(f"/object_info/{name}")[name]["input"]["required"]["model_name"]
        assert FOLDERS | FILES[node] <= set(options["options"]), name
        strangers = set().union(*(files for other, files in FILES.items() if other != node))
        assert not strangers & set(options["options"]), name


def test_a_graph_of_files_and_the_originals_folder(comfyui):
    graph = graphs.video(length=5)
    graph[graphs.MODEL]["inputs"]["model_name"] = "original_folder"
    graph[graphs.ENCODER]["inputs"]["model_name"] = "umt5.safetensors"
    graph[graphs.VAE]["inputs"]["model_name"] = "wan_vae.pth"
    assert graphs.saved(comfyui, comfyui.queue(graph)).stat().st_size > 1000


@pytest.fixture
def gguf_models(comfyui):
    """GGUF files of a transformer and of a UMT5 with its tokenizer, in ComfyUI's folders."""
    models = comfyui.base / "models"
    written = load_file(models / "diffusion_models" / "written_anew.safetensors")
    places = [models / "diffusion_models" / "wan-Q4_K.gguf", models / "text_encoders" / "umt5-Q8_0.gguf"]
    twins = [gguf_files.write(places[0], written, gguf_files.as_city96("Q4_K"))]
    encoder = load_file(models / "text_encoders" / "umt5.safetensors")
    spiece = bytes(encoder.pop("spiece_model").tolist())
    state = {gguf_files.as_llama_cpp(name, "t5"): x for name, x in encoder.items()}
    kinds = itertools.cycle(("Q8_0", "F16"))
    twins.append(gguf_files.write(
        places[1], state, lambda name, shape: next(kinds) if len(shape) == 2 and not shape[1] % 32 else "F32", 1, "t5",
        gguf_files.t5_fields(spiece),
    ))  # fmt: skip
    for twin in twins:
        twin.unlink()
    yield [place.name for place in places]
    for place in places:
        place.unlink()


def test_a_graph_of_gguf_files(comfyui, gguf_models):
    """They are listed, though core's categories leave their ending out; also by the loaders of core's types."""
    transformer, encoder = gguf_models
    for node, field, name in (("AscendLoadDiffusionModel", "model_name", transformer),
                              ("AscendLoadTextEncoder", "model_name", encoder),
                              ("AscendUNETLoader", "unet_name", transformer)):  # fmt: skip
        _, options = comfyui.get(f"/object_info/{node}")[node]["input"]["required"][field]
        assert name in options["options"], node
    graph = graphs.video(length=5)
    graph[graphs.MODEL]["inputs"]["model_name"] = transformer
    graph[graphs.ENCODER]["inputs"]["model_name"] = encoder
    graph[graphs.VAE]["inputs"]["model_name"] = "wan_vae.pth"
    assert graphs.saved(comfyui, comfyui.queue(graph)).stat().st_size > 1000
