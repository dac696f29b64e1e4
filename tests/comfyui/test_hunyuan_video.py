"""HunyuanVideo in the real ComfyUI: our nodes' conditioning is that of core's, and core's graph makes the same latent
from the same file, conditioning and seed. What workflows do not show: whole folders, and what is refused.

Core's own text encoders have no part in this: transformers 5 makes other tokens of their prompts.
"""

import comfy_graphs as graphs
import hunyuan_formats
import pytest
import random_hunyuan
import random_wan
import tiny_llava
import torch
from ascend_runtime.models.registry import family
from scripts.lib.comfy_server import PromptFailed
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-3, "rtol": 0.0}
SIZE = {"width": 96, "height": 64, "length": 9, "batch_size": 1}
FOLDER = "random_hunyuan"
WHOLE, ORIGINAL = "hunyuan_i2v", "hunyuan_original"  # folders: diffusers' of v2 with all parts; the authors'
FILES = {"t2v": "original_hunyuan.safetensors", "i2v concat": "original_hunyuan_i2v.safetensors"}
V1, V2 = "v1 (concat)", "v2 (replace)"
TEXT = {"tokens": 7, "width": random_hunyuan.TEXT_DIM, "pooled": 768}
STEPS, SEED, SHIFT = 3, 5, 7.0


@pytest.fixture(scope="module")
def models(comfyui):
    """The `comfyui` with transformers in the form of ComfyUI's files, and a folder with a VAE."""
    for kind, name in FILES.items():
        state = random_hunyuan.transformer(kind, **random_hunyuan.AS_CORE).state_dict()
        tensors = hunyuan_formats.comfyui_transformer(state)
        save_file(tensors, comfyui.base / "models" / "diffusion_models" / name)
    folders = comfyui.base / "models" / "diffusers"
    tiny_llava.save(random_hunyuan.folder(folders / FOLDER))
    tiny_llava.save(random_hunyuan.folder(folders / WHOLE, "i2v replace"), images=True)
    tensors = hunyuan_formats.original_transformer(random_hunyuan.transformer().state_dict())
    hunyuan_formats.original_folder(folders / ORIGINAL, tensors)
    return comfyui


def conditioned(form: str | None = None, frames: int = 1) -> dict:
    """A graph with a random text; of image to video, core's node and ours with the same image.

    form: V1 or V2; None: text to video."""
    graph = {
        "1": graphs.video()[graphs.PARALLEL],
        "text": {"class_type": "TestRandomText", "inputs": {"seed": 1, **TEXT}},
        "negative text": {"class_type": "TestRandomText", "inputs": {"seed": 3, **TEXT}},
        "empty": {"class_type": "EmptyHunyuanLatentVideo", "inputs": SIZE},
    }
    if form is None:
        return graph
    loader = {"model_name": FOLDER, "dtype": "auto", "parallel": ["1", 0]}
    image = {"seed": 2, "frames": frames, "width": 120, "height": 100}
    shared = {**SIZE, "positive": ["text", 0], "start_image": ["image", 0], "guidance_type": form}
    return graph | {
        "image": {"class_type": "TestRandomImage", "inputs": image},
        "vae": {"class_type": "AscendLoadVAE", "inputs": loader},
        "core vae": {"class_type": "TestLoadCoreVae", "inputs": {"folder": f"models/diffusers/{FOLDER}/vae"}},
        "core": {"class_type": "HunyuanImageToVideo", "inputs": {**shared, "vae": ["core vae", 0]}},
        "ours": {"class_type": "AscendImageToVideo", "inputs": {**shared, "vae": ["vae", 0]}},
    }


def in_place(comfyui, graph: dict) -> dict:
    """The graph with the folder of core's VAE as an absolute path."""
    if "core vae" in graph:
        inputs = graph["core vae"]["inputs"]
        inputs["folder"] = str(comfyui.base / inputs["folder"])
    return graph


def by_core(graph: dict, file: str, positive: list, latent: list, guidance: float | None) -> dict:
    """Adds core's own way from a file to a latent: UNETLoader to SamplerCustomAdvanced, saved as "by core"."""
    model = ["unet", 0]
    if guidance is not None:
        graph["guided"] = {"class_type": "FluxGuidance", "inputs": {"conditioning": positive, "guidance": guidance}}
        positive = ["guided", 0]
    if latent[0] == "core" and file == FILES["t2v"]:
        graph["corrected"] = {"class_type": "TestNoGuidanceOfFirstFrame", "inputs": {"model": model}}
        model = ["corrected", 0]
    schedule = {"scheduler": "simple", "steps": STEPS, "denoise": 1.0, "model": ["shifted", 0]}
    sampled = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0]}
    return graph | {
        "unet": {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}},
        "shifted": {"class_type": "ModelSamplingSD3", "inputs": {"model": model, "shift": SHIFT}},
        "guider": {"class_type": "BasicGuider", "inputs": {"model": ["shifted", 0], "conditioning": positive}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": schedule},
        "sampled": {"class_type": "SamplerCustomAdvanced", "inputs": {**sampled, "latent_image": latent}},
        "by core": graphs.save_latent(["sampled", 0]),
    }


def by_ours(graph: dict, name: str, file: str, positive: list, latent: list, **inputs) -> dict:
    """Adds Ascend Sampler, its latent saved as `name`."""
    loader = {"model_name": file, "dtype": "auto", "parallel": ["1", 0]}
    settings = {"seed": SEED, "steps": STEPS, "cfg": 0.0, "sampler_name": "euler", "scheduler": "simple", "shift": 0.0}
    links = {"model": ["model", 0], "positive": positive, "latent_image": latent}
    return graph | {
        "model": {"class_type": "AscendLoadDiffusionModel", "inputs": loader},
        f"{name} sampler": {"class_type": "AscendSampler", "inputs": {**settings, **links, **inputs}},
        name: graphs.save_latent([f"{name} sampler", 0]),
    }


def latents(comfyui, graph: dict) -> dict:
    """What a graph saves, by the name of the node that saves it."""
    prompt = comfyui.queue(in_place(comfyui, graph))
    saving = [name for name, node in graph.items() if node["class_type"] == "SaveLatent"]
    return {name: graphs.saved_latent(comfyui, prompt, name) for name in saving}


def assert_alike(made: dict) -> None:
    core = made.pop("by core")
    for name, latent in made.items():
        print(f"{name}: at most {(latent - core).abs().max():.1e} apart; core's deviation is {core.std():.2f}")
        assert core.std() > 0.1
        assert_close(latent, core, **TOLERANCE)


def test_text_to_video_is_that_of_cores_graph(models):
    """Core's FluxGuidance counts in ours too, and so does our widget."""
    graph = by_core(conditioned(), FILES["t2v"], ["text", 0], ["empty", 0], guidance=4.5)
    graph = by_ours(graph, "guided by core", FILES["t2v"], ["guided", 0], ["empty", 0])
    graph = by_ours(graph, "guided by ours", FILES["t2v"], ["text", 0], ["empty", 0], embedded_guidance=4.5)
    made = latents(models, graph)
    assert_alike(made)


def test_without_guidance_both_have_the_models_own(models):
    graph = by_core(conditioned(), FILES["t2v"], ["text", 0], ["empty", 0], guidance=None)
    assert_alike(latents(models, by_ours(graph, "ours", FILES["t2v"], ["text", 0], ["empty", 0])))


@pytest.mark.parametrize("form, kind, guidance", [(V1, "i2v concat", None), (V2, "t2v", 7.5)], ids=["v1", "v2"])
def test_image_to_video_is_that_of_cores_graph(models, form, kind, guidance):
    """From core's node and from ours. In core the clean first frame of v2 is guided too: here that is corrected."""
    graph = by_core(conditioned(form), FILES[kind], ["core", 0], ["core", 1], guidance)
    guided = {} if guidance is None else {"embedded_guidance": guidance}
    graph = by_ours(graph, "of core's node", FILES[kind], ["guided" if guided else "core", 0], ["core", 1])
    graph = by_ours(graph, "of our node", FILES[kind], ["ours", 0], ["ours", 2], **guided)
    assert_alike(latents(models, graph))


@pytest.mark.parametrize("form, frames", [(V1, 1), (V1, 5), (V2, 1)])
def test_conditioning_is_that_of_cores_node(models, form, frames):
    graph = in_place(models, conditioned(form, frames))
    outputs = {"core conditioning": ["core", 0], "core latent": ["core", 1],
               "ours conditioning": ["ours", 0], "ours latent": ["ours", 2]}  # fmt: skip
    for name, link in outputs.items():
        graph[name] = {"class_type": "TestSave", "inputs": {name.split()[1]: link}}
    prompt = models.queue(graph)
    saved = {name: load_file(graphs.saved(models, prompt, name)) for name in outputs}
    for kind in ("conditioning", "latent"):
        core, ours = saved[f"core {kind}"], saved[f"ours {kind}"]
        assert core.keys() == ours.keys()
        for name, expected in core.items():
            assert_close(ours[name], expected, **TOLERANCE, msg=lambda said, name=name: f"{kind} {name}: {said}")
    assert ("guiding_frame_index" in saved["ours conditioning"]) == (form == V2)
    assert ("noise_mask" in saved["ours latent"]) == (form == V2)


REFUSED = {  # what is given to which kind of file: parts of the error
    "an image of v1 for a model of v2": ((V1, "t2v"), ["concat_latent", "v2 (replace)"]),
    "an image of v2 for a model of v1": ((V2, "i2v concat"), ["guiding_frame_index", "v1 (concat)"]),
    "core's third form": (("custom", "t2v"), ["ref_latent", "v1 (concat)", "v2 (replace)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_does_not_take_is_refused_by_name(models, case):
    (form, kind), parts = REFUSED[case]
    graph = conditioned(form)
    del graph["ours"]
    graph = by_ours(graph, "saved", FILES[kind], ["core", 0], ["core", 1])
    with pytest.raises(PromptFailed) as caught:
        models.wait(models.queue(in_place(models, graph)))
    assert caught.value.details["exception_type"] == "ValueError"
    assert caught.value.details["node_type"] == "AscendSampler"
    for part in parts:
        assert part in caught.value.details["exception_message"]


def test_loaders_list_whole_folders(models):
    """Of diffusers, and of the model's authors, whose names of folders do not matter."""
    node = models.get("/object_info/AscendLoadDiffusionModel")["AscendLoadDiffusionModel"]
    listed, *options = node["input"]["required"]["model_name"]
    assert {FOLDER, WHOLE, ORIGINAL} <= set(listed if isinstance(listed, list) else options[0]["options"])


def seen(encoder: str, **vision) -> dict:
    """A graph that encodes a prompt with an image, as far as the text; encoder: the text encoder's folder."""
    loader = {"model_name": encoder, "dtype": "auto", "parallel": ["1", 0], **vision}
    prompt = {"text_encoder": ["encoder", 0], "text": "a red ball", "image": ["image", 0], "image_interleave": 4}
    return {
        "1": graphs.video()[graphs.PARALLEL],
        "image": {"class_type": "TestRandomImage", "inputs": {"seed": 2, "frames": 1, "width": 120, "height": 100}},
        "encoder": {"class_type": "AscendLoadTextEncoder", "inputs": loader},
        "prompt": {"class_type": "AscendTextEncode", "inputs": prompt},
        "saved prompt": {"class_type": "TestSave", "inputs": {"conditioning": ["prompt", 0]}},
    }


def test_one_folder_has_all_parts(models):
    """The prompt's image is seen by the vision tower next to the Llama, and the first frame stays the VAE's."""
    loader = {"model_name": WHOLE, "dtype": "auto", "parallel": ["1", 0]}
    image = {**SIZE, "positive": ["prompt", 0], "vae": ["vae", 0], "start_image": ["image", 0], "guidance_type": V2}
    graph = seen(WHOLE) | {
        "vae": {"class_type": "AscendLoadVAE", "inputs": loader},
        "ours": {"class_type": "AscendImageToVideo", "inputs": image},
        "start": graphs.save_latent(["ours", 2]),
    }
    graph = by_ours(graph, "made", WHOLE, ["ours", 0], ["ours", 2])
    graph["made sampler"]["inputs"]["scheduler"] = "hunyuan_video"
    prompt = models.queue(graph)
    start, made = (graphs.saved_latent(models, prompt, name) for name in ("start", "made"))
    text = load_file(graphs.saved(models, prompt, "saved prompt"))
    assert text["text"].shape[1] > 144 and text["pooled_output"].shape == (1, random_hunyuan.POOLED_DIM)
    assert_close(made[:, :, :1], start[:, :, :1])
    assert (made[:, :, 1:] - start[:, :, 1:]).abs().max() > 0.1


UNSEEN = {  # text encoder: parts of the error
    FOLDER: ["has no LLaVA vision tower", "vision_model_name", "llava_llama3_vision.safetensors"],
    "wide_text_encoder": ["reads no images"],
}


@pytest.mark.parametrize("encoder, parts", UNSEEN.items(), ids=UNSEEN)
def test_an_image_that_nobody_sees_is_refused(models, encoder, parts):
    with pytest.raises(PromptFailed) as caught:
        models.wait(models.queue(seen(encoder)))
    assert caught.value.details["node_type"] == "AscendTextEncode"
    for part in parts:
        assert part in caught.value.details["exception_message"]


def test_latents_are_normalised_and_pictured_as_by_core():
    core, ours = random_wan.core_latent_format("HunyuanVideo"), family("hunyuan_video").latent_format({}, {})
    assert_close(torch.tensor(ours.std), torch.full((16,), 1 / core.scale_factor))
    assert set(ours.mean) == {0.0}
    assert_close(torch.tensor(ours.rgb), torch.tensor(core.latent_rgb_factors))
    assert_close(torch.tensor(ours.rgb_bias), torch.tensor(core.latent_rgb_factors_bias))
