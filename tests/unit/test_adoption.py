"""`adopt`: the loaders of stock graphs swapped for ours, and back."""

import copy
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from random_wan import original_transformer
from safetensors.torch import save_file

from ascend_runtime.commands.adoption.loaders import STOCK_LOADERS
from ascend_runtime.commands.adoption.swapping import KEPT, PACK, adopt, give_back

ROOT = Path(__file__).resolve().parents[2]
MODEL, CLIP, VAE = "wan2.2_t2v_high_noise_14B_fp16.safetensors", "umt5_xxl_fp16.safetensors", "wan_2.1_vae.safetensors"
LLAMA, CLIP_L = "llava_llama3_fp8_scaled.safetensors", "clip_l.safetensors"
HUNYUAN, HUNYUAN_VAE = "hunyuan_video_t2v_720p_bf16.safetensors", "hunyuan_video_vae_bf16.safetensors"


def node(number, kind, values, output=None, **more):
    outputs = [{"name": output, "type": output, "links": [number]}] if output else []
    properties = {"cnr_id": "comfy-core", "ver": "0.3.45", "Node name for S&R": kind, "models": [{"name": values[0]}]}
    return {"id": number, "type": kind, "pos": [10 * number, 0], "size": [300, 80.5], "flags": {}, "order": number,
            "mode": 0, "inputs": [], "outputs": outputs, "properties": properties, "widgets_values": values, **more}


def loaders(model=MODEL, clip_type="wan", vae=VAE):
    return [node(1, "UNETLoader", [model, "fp8_e4m3fn"], "MODEL"),
            node(2, "CLIPLoader", [CLIP, clip_type, "cpu"], "CLIP"),
            node(3, "VAELoader", [vae], "VAE")]  # fmt: skip


def ui(nodes, **more):
    links = [[number, number, 0, 10 + number, 0, "ANY"] for number in (1, 2, 3)]
    return {"id": "a", "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4, **more}


def api(nodes):
    return {"1": {"inputs": {"unet_name": MODEL, "weight_dtype": "default"}, "class_type": "UNETLoader",
                  "_meta": {"title": "High noise"}},
            "2": {"inputs": {"clip_name": CLIP, "type": "wan", "device": "default"}, "class_type": "CLIPLoader"},
            "3": {"inputs": {"vae_name": VAE}, "class_type": "VAELoader"},
            "4": {"inputs": {"text": "A cat.", "clip": ["2", 0]}, "class_type": "CLIPTextEncode"}} | nodes  # fmt: skip


def types(graph):
    return [one["type"] for one in graph["nodes"]]


def same(graph, other):
    """The same JSON, with its order."""
    return json.dumps(graph) == json.dumps(other)


def swapped_and_back(graph, find=lambda part, name: None):
    before = copy.deepcopy(graph)
    done = adopt(graph, find)
    assert same(graph, before), "the graph that was given changed"
    assert same(give_back(done.graph).graph, before)
    assert len(give_back(done.graph).swapped) == len(done.swapped)
    again = adopt(done.graph, find)
    assert not again.swapped and same(again.graph, done.graph)
    return done


def test_loaders_change_their_type_and_keep_all_else():
    graph = ui(loaders())
    done = swapped_and_back(graph)
    assert types(done.graph) == ["AscendUNETLoader", "AscendCLIPLoader", "AscendVAELoader"] and not done.left
    for old, new in zip(graph["nodes"], done.graph["nodes"]):
        assert {key for key in old if old[key] != new[key]} == {"type", "properties"}
        assert new["properties"]["cnr_id"] == PACK["cnr_id"] and new["properties"]["models"] == [
            {"name": old["widgets_values"][0]}
        ]
    assert done.graph["links"] == graph["links"]
    assert [str(one) for one in done.swapped][0] == f"UNETLoader #1 ({MODEL})"


def test_graph_of_the_api_is_swapped():
    graph = api({})
    done = swapped_and_back(graph)
    for key, one in done.graph.items():
        assert one["inputs"] == graph[key]["inputs"]
    assert [one["class_type"] for one in done.graph.values()] == [
        "AscendUNETLoader", "AscendCLIPLoader", "AscendVAELoader", "CLIPTextEncode"]  # fmt: skip
    assert done.graph["1"]["_meta"] == {"title": "High noise"}


def test_two_text_encoders_are_swapped():
    nodes = [node(1, "UNETLoader", [HUNYUAN, "default"], "MODEL"), node(3, "VAELoader", [HUNYUAN_VAE], "VAE"),
             node(2, "DualCLIPLoader", [CLIP_L, LLAMA, "hunyuan_video", "default"], "CLIP")]  # fmt: skip
    done = swapped_and_back(ui(nodes))
    assert types(done.graph) == ["AscendUNETLoader", "AscendVAELoader", "AscendDualCLIPLoader"]


def test_loaders_in_subgraphs_and_group_nodes_are_swapped():
    inner = {"id": "0-1", "name": "Image to Video", "nodes": loaders(), "links": [], "inputs": [], "extra": {}}
    deeper = {"id": "0-2", "name": "Deep", "nodes": loaders(), "links": [], "definitions": {"subgraphs": [inner]}}
    group = {"nodes": [one | {"index": i} for i, one in enumerate(loaders())], "links": [[0, 0, 1, 0, "MODEL"]],
             "external": []}  # fmt: skip
    graph = ui([node(9, "0-2", ["x"])], definitions={"subgraphs": [deeper]})
    graph["extra"]["groupNodes"] = {"All loaders": group}
    done = swapped_and_back(graph)
    assert len(done.swapped) == 9
    assert {one.where for one in done.swapped} == {"subgraph Image to Video", "subgraph Deep", "group node All loaders"}
    in_group = done.graph["extra"]["groupNodes"]["All loaders"]
    assert types(in_group) == ["AscendUNETLoader", "AscendCLIPLoader", "AscendVAELoader"]
    assert in_group["config"] == {str(i): {"input": {"parallel": {"visible": False}}} for i in range(3)}


@pytest.mark.parametrize("config", [{}, {"0": {"input": {"unet_name": {"visible": False}}}, "1": {"output": {}}}])
def test_settings_of_a_group_node_come_back(config):
    group = {"nodes": [one | {"index": i} for i, one in enumerate(loaders())], "links": [], "config": config}
    graph = ui([], extra={"groupNodes": {"Loaders": group}})
    assert len(swapped_and_back(graph).swapped) == 3


@pytest.mark.parametrize("model, what", {
    "wan2.1_vace_14B_fp16.safetensors": "Wan VACE",
    "wan2.2_s2v_14B_fp8_scaled.safetensors": "Wan S2V",
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors": "HunyuanVideo 1.5",
    "flux1-dev.safetensors": "its name does not say",
}.items())  # fmt: skip
def test_model_that_the_ranks_do_not_run_stays_with_its_text_encoder_and_vae(model, what):
    done = swapped_and_back(ui(loaders(model)))
    assert not done.swapped and len(done.left) == 3
    assert what in done.left[0][1] and "stays with its model" in done.left[1][1]


def test_another_models_text_encoder_and_vae_stay():
    """Next to a model that the ranks run."""
    others = [node(4, "CLIPLoader", ["t5xxl.safetensors", "sd3", "default"], "CLIP"),
              node(5, "VAELoader", ["ae.safetensors"], "VAE"),
              node(6, "VAELoader", ["pixel_space"], "VAE")]  # fmt: skip
    done = swapped_and_back(ui(loaders() + others))
    assert [one.id for one in done.swapped] == ["1", "2", "3"] and [one.id for one, _ in done.left] == ["4", "5", "6"]
    assert "its type is sd3; the ranks run hunyuan_video and wan" in done.left[0][1]


@pytest.mark.parametrize("kind, value, what", [
    ("unCLIPCheckpointLoader", "wan.safetensors", "Load the model, the text encoder and the VAE from separate files"),
    ("UnetLoaderGGUF", "wan2.2-Q4.gguf", "Load them with Ascend Load Diffusion Model"),
    ("WanVideoModelLoader", "wan2.2.safetensors", "WanVideoWrapper"),
    ("SomeVAELoader", "wan_vae.safetensors", "no loader of ours"),
])  # fmt: skip
def test_other_loaders_are_listed_with_a_reason(kind, value, what):
    output = "WANVIDEOMODEL" if kind.startswith("WanVideo") else "VAE"
    done = swapped_and_back(ui(loaders() + [node(7, kind, [value], output)]))
    ((left, why),) = done.left
    assert (left.id, left.type, left.names) == ("7", kind, (value,)) and what in why


def test_a_checkpoints_loader_changes_its_type():
    done = swapped_and_back(ui([node(1, "CheckpointLoaderSimple", ["wan2.2-rapid-aio.safetensors"], "MODEL"),
                                node(2, "VAELoader", [VAE], "VAE")]))  # fmt: skip
    assert types(done.graph) == ["AscendCheckpointLoaderSimple", "AscendVAELoader"] and not done.left
    done = swapped_and_back(ui([node(1, "CheckpointLoaderSimple", ["sd_xl_base_1.0.safetensors"], "MODEL")]))
    assert not done.swapped and "does not say that it belongs to Wan or HunyuanVideo" in done.left[0][1]


def test_nodes_that_take_a_model_are_not_listed():
    """A LoRA loader takes a MODEL and puts one out."""
    lora = node(7, "LoraLoaderModelOnly", ["wan.safetensors", 1.0], "MODEL")
    lora["inputs"] = [{"name": "model", "type": "MODEL"}]
    assert not adopt(ui(loaders() + [lora])).left


@pytest.mark.parametrize("kind", ["workflow>Loaders", "workflow/Loaders", "cb63cc72-d82e-4c9b-988d-6807f538d6ab"])
def test_nodes_that_hold_loaders_are_not_listed(kind):
    assert not adopt(ui(loaders() + [node(7, kind, [VAE], "VAE")])).left


def test_name_that_comes_from_another_node_is_not_known():
    done = swapped_and_back(api({"1": {"inputs": {"unet_name": ["8", 0]}, "class_type": "UNETLoader"}}))
    assert "comes from another node" in done.left[0][1] and len(done.left) == 3


def files_of(root):
    def find(part, name):
        path = root / name
        return path if path.is_file() else None

    return find


def test_content_decides_where_the_file_is_found(tmp_path):
    """Whatever its name."""
    original_transformer(tmp_path / "flux.safetensors", layers=1)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / MODEL)
    find = files_of(tmp_path)
    assert [one.id for one in swapped_and_back(ui(loaders("flux.safetensors")), find).swapped] == ["1", "2", "3"]
    done = swapped_and_back(ui(loaders()), find)
    reason = done.left[0][1]
    assert not done.swapped and MODEL in reason and str(tmp_path) not in reason and len(reason) < 320


@pytest.mark.parametrize("as_dicts", [False, True])
def test_connected_parallel_config_is_disconnected(as_dicts):
    graph = ui(loaders())
    done = adopt(graph).graph
    done["nodes"][0]["inputs"].append({"name": "parallel", "type": "ASCEND_PARALLEL", "link": 9})
    config = node(8, "AscendParallelConfig", [2])
    done["nodes"].append(config | {"outputs": [{"name": "parallel", "type": "ASCEND_PARALLEL", "links": [9]}]})
    done["links"].append([9, 8, 0, 1, 0, "ASCEND_PARALLEL"])
    if as_dicts:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        graph["links"], done["links"] = ([dict(zip(names, link)) for link in one["links"]] for one in (graph, done))
    back = give_back(done)
    assert back.graph["nodes"][-1]["outputs"][0]["links"] == []
    assert back.graph["nodes"][:-1] == graph["nodes"] and back.graph["links"] == graph["links"]
    assert "AscendUNETLoader #1" in back.notes[0] and "parallel" in back.notes[0]


def test_loader_of_ours_that_was_not_swapped_becomes_cores_too():
    ours = node(1, "AscendUNETLoader", [MODEL, "default"], "MODEL")
    ours["properties"] = {"cnr_id": "ascend-video", "ver": "0.1.0"}
    accelerated = node(2, "AscendApplyAcceleration", ["x"], "MODEL")
    back = give_back(ui([ours, accelerated]))
    assert back.graph["nodes"][0]["type"] == "UNETLoader"
    assert back.graph["nodes"][0]["properties"] == {"cnr_id": "comfy-core"}
    assert "AscendApplyAcceleration" in back.notes[0] and "Bypass" in back.notes[0]


@pytest.mark.parametrize("graph", [[], {}, {"prompt": {}}, {"nodes": {}}, {"1": {"inputs": {}}}, "text", None])
def test_what_is_not_a_graph_is_refused(graph):
    for swap in (adopt, give_back):
        with pytest.raises(ValueError, match="not a ComfyUI workflow.*Export"):
            swap(graph)


@pytest.mark.parametrize("odd", [
    {"nodes": [None, 3, {"type": 5}, {"type": "UNETLoader"}, {"type": "VAELoader", "widgets_values": None}]},
    {"nodes": [{"type": "UNETLoader", "widgets_values": {"unet_name": MODEL}, "properties": [], "inputs": 3}]},
    {"nodes": [], "extra": [], "definitions": {"subgraphs": [None, {"nodes": None}]}},
    {"nodes": [], "extra": {"groupNodes": {"a": None, "b": {"nodes": [{"type": "VAELoader"}], "config": 3}}}},
    {"nodes": [{"type": "AscendUNETLoader", "properties": {KEPT: 7}, "inputs": [None, {"name": "parallel"}]}],
     "links": [None, [], {}]},
    {"nodes": [{"type": "PrimitiveNode", "outputs": [{"type": ["euler", "heun"]}], "inputs": [{"type": {}}]}]},
    {"1": {"class_type": None, "inputs": 3}, "2": {"class_type": "VAELoader"}},
])  # fmt: skip
def test_odd_graphs_are_not_an_error(odd):
    give_back(adopt(odd).graph)


def test_nodes_and_the_pack_are_named_as_the_pack_says():
    name, version = re.search(r'name = "(.*)"\nversion = "(.*)"', (ROOT / "pyproject.toml").read_text()).groups()
    assert PACK == {"cnr_id": name, "ver": version}
    assert all(loader.ours == f"Ascend{loader.core}" for loader in STOCK_LOADERS)


def published():
    """ComfyUI's own templates, where its package is installed."""
    spec = find_spec("comfyui_workflow_templates")
    near = Path(spec.origin).parents[1] if spec else Path("/none")
    return sorted(near.glob("comfyui_workflow_templates*/templates/*.json"))


@pytest.mark.skipif(not published(), reason="comfyui_workflow_templates is not installed")
def test_all_published_templates_come_back_as_they_were():
    swapped = {}
    for file in published():
        graph = json.loads(file.read_text())
        if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
            done = adopt(graph)
            assert same(give_back(done.graph).graph, graph), file
            swapped[file.stem] = len(done.swapped)
    assert swapped["text_to_video_wan"] == 3 and swapped["video_wan2_2_14B_t2v"] >= 4
    assert swapped["03_video_wan2_2_14B_i2v_subgraphed"] == 4 and swapped["hunyuan_video_text_to_video"] == 3
    assert not [name for name, count in swapped.items() if count and "wan" not in name and "hunyuan" not in name]


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "ascend_runtime", "adopt", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize("indent, end", [(None, ""), (2, "\n")])
def test_command_writes_the_swapped_file_and_the_file_as_it_was(tmp_path, indent, end):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(ui(loaders(), title="視频"), indent=indent, ensure_ascii=False) + end)
    there = command(file)
    assert there.returncode == 0 and f"swapped: UNETLoader #1 ({MODEL})" in there.stdout
    swapped = tmp_path / "graph_ascend.json"
    again = command(file)
    assert again.returncode == 1 and "exists" in again.stderr
    back = command(swapped, "--back", "--output", tmp_path / "back.json")
    assert back.returncode == 0 and (tmp_path / "back.json").read_bytes() == file.read_bytes()


def test_command_lists_what_it_leaves_and_writes_nothing(tmp_path):
    (tmp_path / "models").mkdir()
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(ui(loaders("wan2.1_vace_14B.safetensors"))))
    done = command(file, "--models", tmp_path / "models")
    assert done.returncode == 1 and "left: UNETLoader #1" in done.stdout and "Wan VACE" in done.stdout
    assert [one.name for one in tmp_path.glob("*.json")] == ["graph.json"]
    assert command(tmp_path / "none.json").returncode == 2
