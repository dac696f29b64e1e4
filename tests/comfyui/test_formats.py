"""The loaders list what lies in ComfyUI's folders, whoever wrote it, and a graph of such models makes a video."""

import comfy_graphs as graphs

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
