"""Core's CLIP type on the ranks: core's own nodes, and others', make of it what they make of core's CLIP of the same
files."""

import json

import comfy_graphs as graphs
import hunyuan_encoders
import original_formats
import pytest
import random_hunyuan
import tiny_llava
import tiny_models
import torch
from scripts.lib.comfy_server import PromptFailed, PromptRejected
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import UMT5Config, UMT5EncoderModel

TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}
UMT5, LLAMA, CLIP = "stock_umt5.safetensors", "stock_llama.safetensors", "stock_clip.safetensors"
LLAMA_VOCABULARY, CLIP_VOCABULARY = 128320, 49408  # of core's networks
UMT5_SIZES = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "vocab_size": 40}
LLAMA_SIZES = {"hidden_size": random_hunyuan.TEXT_DIM, "intermediate_size": 40, "num_hidden_layers": 5,
               "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": LLAMA_VOCABULARY}  # fmt: skip
CLIP_SIZES = {"hidden_size": random_hunyuan.POOLED_DIM, "intermediate_size": 20, "num_hidden_layers": 2,
              "num_attention_heads": 1}  # fmt: skip
LOADERS = {  # by type: our loader and its files; the sizes of core's networks
    "wan": ("AscendCLIPLoader", {"clip_name": UMT5}, {"umt5xxl": UMT5_SIZES}),
    "hunyuan_video": (
        "AscendDualCLIPLoader", {"clip_name1": CLIP, "clip_name2": LLAMA}, {"llama": LLAMA_SIZES, "clip_l": CLIP_SIZES}
    ),
}  # fmt: skip
LONG = "a red circle moving right on a blue background, " * 16  # more than 512 tokens, and than 77


@pytest.fixture(scope="module")
def files(comfyui, tmp_path_factory):
    """The `comfyui` with small text encoders, as core's loaders read them, in fp16, in which core keeps them."""
    folder = comfyui.base / "models" / "text_encoders"
    config = UMT5Config(**UMT5_SIZES, dropout_rate=0.0)
    umt5 = tiny_models.randomise(UMT5EncoderModel(config), 5)
    tensors = original_formats.comfyui_umt5(umt5, original_formats.sentencepiece_model(), torch.float16)
    save_file(tensors, folder / UMT5)
    made = tmp_path_factory.mktemp("hunyuan")
    tiny_llava.llama(7, vocab_size=LLAMA_VOCABULARY).save_pretrained(made / "text_encoder")
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    tiny_llava.clip_text(7, vocab_size=CLIP_VOCABULARY, **ends).save_pretrained(made / "text_encoder_2")
    for name, tensors in ((LLAMA, hunyuan_encoders.llama_tensors(made)), (CLIP, hunyuan_encoders.clip_tensors(made))):
        tensors.pop("text_projection.weight", None)
        halves = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        save_file({key: value for key, value in halves.items() if "position_ids" not in key}, folder / name)
    return comfyui


def loaded(kind: str, ranks: int = 2, device: str = "default") -> dict:
    """A graph with core's CLIP of the files, "core", and ours, "ours"."""
    loader, names, sizes = LOADERS[kind]
    core = {"names": "\n".join(names.values()), "type": kind, "sizes": json.dumps(sizes)}
    return {
        "ranks": graphs.video(ranks=ranks)[graphs.PARALLEL],
        "core": {"class_type": "TestLoadSmallCoreClip", "inputs": core},
        "ours": {"class_type": loader, "inputs": {**names, "type": kind, "device": device, "parallel": ["ranks", 0]}},
    }


def with_both(graph: dict, name: str, node: str, **inputs) -> None:
    """Adds an encoding node for each CLIP, and saves its conditioning."""
    for clip in ("core", "ours"):
        graph[f"{name} {clip}"] = {"class_type": node, "inputs": {"clip": [clip, 0], **inputs}}
        held = {"conditioning": [f"{name} {clip}", 0]}
        graph[f"saved {name} {clip}"] = {"class_type": "TestSave", "inputs": held}


def assert_alike(comfyui, graph: dict) -> dict:
    """Core's and ours are equal. Returns ours by name."""
    prompt = comfyui.queue(graph)
    names = [name.removeprefix("saved ").removesuffix(" core") for name in graph
             if name.startswith("saved ") and name.endswith(" core")]  # fmt: skip
    assert names
    saved = {}
    for name in names:
        core, ours = (load_file(graphs.saved(comfyui, prompt, f"saved {name} {clip}")) for clip in ("core", "ours"))
        assert core.keys() == ours.keys() and core
        for key, expected in core.items():
            apart = (ours[key] - expected).abs().max()
            print(f"{name} {key} {list(expected.shape)}: {apart:.1e} apart, deviation {expected.float().std():.2f}")
            assert_close(ours[key], expected, **TOLERANCE, msg=lambda said, key=key: f"{name} {key}: {said}")
        saved[name] = ours
    return saved


TEXTS = {
    "plain": "a red circle",
    "empty": "",
    "weights": "a (red:1.4) circle, ((moving)) [left] \\(up\\)",
    "spaces": "  a red\n\ncircle &amp; down ",
    "long": LONG,
    "long weights": f"(green:0.5) {LONG}",
}


@pytest.mark.parametrize("kind, ranks", [("wan", 2), ("hunyuan_video", 2), ("wan", 1), ("hunyuan_video", 1)])
def test_core_encodes_texts_as_with_cores_clip(files, kind, ranks, request):
    """Weights, texts that are longer than in training, and spaces, which core keeps. Core's Wan knows no embeddings of
    textual inversion: there they are words."""
    if ranks == 1 and not request.config.getoption("--all-stock"):
        pytest.skip("other numbers of ranks: --all-stock")
    graph = loaded(kind, ranks)
    words = {"embedding": "a cat, embedding:easy bad"} if kind == "wan" else {}
    for name, text in (TEXTS | words).items():
        with_both(graph, name, "CLIPTextEncode", text=text)
    made = assert_alike(files, graph)
    assert made["plain"]["text"].std() > 0.01
    differing = [made[name]["text"][:, :20] for name in ("plain", "empty", "weights", "long")]
    for index, one in enumerate(differing):
        assert all(one.shape != other.shape or not torch.equal(one, other) for other in differing[:index])
    if kind == "wan":
        assert made["long"]["text"].shape[1] > 512


TEMPLATE_NODE = "TextEncodeHunyuanVideo_ImageToVideo"


def test_core_encodes_a_prompt_about_an_image_as_with_cores_clip(files):
    graph = loaded("hunyuan_video")
    graph["seen"] = {"class_type": "TestImageTokens", "inputs": {"tokens": 9, "width": random_hunyuan.TEXT_DIM}}
    for every in (1, 4):
        with_both(graph, f"every {every}", TEMPLATE_NODE, clip_vision_output=["seen", 0], prompt="a red ball",
                  image_interleave=every)  # fmt: skip
    made = assert_alike(files, graph)
    assert made["every 1"]["text"].shape[1] == made["every 4"]["text"].shape[1] + 9 - 3


@pytest.mark.parametrize("kind", LOADERS)
def test_nodes_of_other_packs_encode_as_with_cores_clip(files, kind):
    graph = loaded(kind, device="cpu")
    with_both(graph, "raw", "TestEncodeRaw", text=TEXTS["weights"])
    made = assert_alike(files, graph)
    assert len([name for name in made["raw"] if name.endswith(" text")]) == len(LOADERS[kind][2])


def ours(kind: str, text: str = "a red circle") -> dict:
    """A graph that encodes a text with our CLIP."""
    graph = loaded(kind)
    del graph["core"]
    graph["encoded"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["ours", 0], "text": text}}
    graph["saved"] = {"class_type": "TestSave", "inputs": {"conditioning": ["encoded", 0]}}
    return graph


def through(node: str, **inputs) -> dict:
    """A graph with a node between our CLIP and what encodes with it."""
    graph = ours("wan")
    graph["between"] = {"class_type": node, "inputs": {"clip": ["ours", 0], **inputs}}
    graph["encoded"]["inputs"]["clip"] = ["between", 0]
    return graph


def saving() -> dict:
    graph = ours("wan")
    graph["save"] = {"class_type": "CLIPSave", "inputs": {"clip": ["ours", 0], "filename_prefix": "clip"}}
    return graph


def merging() -> dict:
    graph = loaded("wan")
    names = {"clip1": ["core", 0], "clip2": ["ours", 0], "ratio": 0.5}
    graph["between"] = {"class_type": "CLIPMergeSimple", "inputs": names}
    graph["encoded"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["between", 0], "text": "red"}}
    graph["saved"] = {"class_type": "TestSave", "inputs": {"conditioning": ["encoded", 0]}}
    return graph


def image_with_weights() -> dict:
    graph = ours("hunyuan_video")
    graph["seen"] = {"class_type": "TestImageTokens", "inputs": {"tokens": 9, "width": random_hunyuan.TEXT_DIM}}
    prompt = {"clip": ["ours", 0], "clip_vision_output": ["seen", 0], "prompt": "a (red:1.5) ball"}
    graph["encoded"] = {"class_type": TEMPLATE_NODE, "inputs": {**prompt, "image_interleave": 2}}
    return graph


def other_vision_model() -> dict:
    graph = image_with_weights()
    graph["encoded"]["inputs"]["prompt"] = "a red ball"
    graph["seen"]["inputs"]["width"] = 16
    return graph


def of_type(kind: str, named: str) -> dict:
    graph = ours(kind)
    graph["ours"]["inputs"]["type"] = named
    return graph


def single(name: str) -> dict:
    graph = of_type("wan", "hunyuan_video")
    graph["ours"]["inputs"]["clip_name"] = name
    return graph


REFUSED = {  # a graph; the node that fails; parts of the error
    "CLIP Set Last Layer": (through("CLIPSetLastLayer", stop_at_clip_layer=-2), "CLIPTextEncode",
                            ["CLIP Set Last Layer asks for layer -2", "Remove CLIP Set Last Layer"]),
    "an embedding": (ours("hunyuan_video", "a cat, embedding:easy bad"), "CLIPTextEncode",
                     ["'embedding:easy", "Remove these"]),
    "Save CLIP": (saving(), "CLIPSave", ["The CLIP of Ascend Load CLIP (Core) cannot be saved here"]),
    "merging": (merging(), "CLIPMergeSimple", ["cannot be merged here", "core's own loader"]),
    "a LoRA": (through("TestClipLora", layer="encoder.block.0.layer.0.SelfAttention.q", strength=0.5), "TestClipLora",
               ["umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "Set strength_clip to 0"]),
    "weights and an image": (image_with_weights(), TEMPLATE_NODE, ["(word:1.2)", "Remove the weights"]),
    "another vision model": (other_vision_model(), TEMPLATE_NODE, ["[9, 16]", "[n, 24]", "llava_llama3_vision"]),
    "another model's encoder": (single(UMT5), "AscendCLIPLoader",
                                ["type is hunyuan_video", "text encoder of Wan models", "Use type wan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_ranks_do_not_do_is_refused_by_name(files, case):
    graph, node, parts = REFUSED[case]
    with pytest.raises(PromptFailed) as caught:
        files.wait(files.queue(graph))
    assert caught.value.details["node_type"] == node
    for part in parts:
        assert part in caught.value.details["exception_message"]


def test_without_what_was_refused_the_graph_runs(files):
    """And with what changes nothing: the own last layer, a LoRA of strength 0."""
    expected = load_file(graphs.saved(files, files.queue(ours("wan")), "saved"))["text"]
    assert expected.std() > 0.01
    lora = {"layer": "encoder.block.0.layer.0.SelfAttention.q", "strength": 0.0}
    for graph in (through("CLIPSetLastLayer", stop_at_clip_layer=-1), through("TestClipLora", **lora)):
        made = load_file(graphs.saved(files, files.queue(graph), "saved"))["text"]
        assert torch.equal(made, expected)


@pytest.mark.parametrize("kind, named", [("wan", "flux2"), ("hunyuan_video", "sdxl")])
def test_types_of_other_models_are_refused_before_the_graph_runs(files, kind, named):
    with pytest.raises(PromptRejected) as caught:
        files.queue(of_type(kind, named))
    said = json.dumps(caught.value.body["node_errors"])
    assert f"type is {named}; the ranks run the text encoders of wan, hunyuan_video" in said


def test_a_folder_with_a_tokenizer_json_is_read_too(files):
    """As in the models that come with the pack: core itself reads only sentencepiece models."""
    graph = ours("wan", "a red circle")
    graph["ours"]["inputs"]["clip_name"] = graphs.RANDOM
    graph["encoder"] = {"class_type": "AscendLoadTextEncoder", "inputs": {"model_name": graphs.RANDOM, "dtype": "auto",
                                                                         "parallel": ["ranks", 0]}}  # fmt: skip
    prompt = {"text_encoder": ["encoder", 0], "text": "a red circle"}
    graph["plain"] = {"class_type": "AscendTextEncode", "inputs": prompt}
    graph["saved plain"] = {"class_type": "TestSave", "inputs": {"conditioning": ["plain", 0]}}
    done = files.queue(graph)
    made, expected = (load_file(graphs.saved(files, done, node))["text"] for node in ("saved", "saved plain"))
    assert_close(made, expected, **TOLERANCE)
