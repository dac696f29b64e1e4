"""ComfyUI's own templates, their loaders swapped by `adopt`: the latent is that of core's own loaders, on the same
random weights and pictures.

A template whose nodes this ComfyUI lacks is skipped; run with a newer one by `scripts/test.sh --comfyui DIR`.
"""

import comfy_graphs as graphs
import pytest
import stock_models
import stock_templates as stock
import torch
from ascend_runtime.commands.adoption.loaders import FOLDERS
from ascend_runtime.commands.adoption.swapping import adopt, give_back

TOLERANCE = 1e-4  # of the latent's largest value
LOADERS = {"UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader"}
ON_ONE_RANK = ("text_to_video_wan", "video_wan2_2_14B_i2v")  # without --all-stock
ALL_ONLY = ("+video_wan2_2_14B_flf2v",)  # with --all-stock: it makes the prompt of the older one


@pytest.fixture(scope="module")
def server(comfyui):
    """The `comfyui` with models and pictures under the names that templates ask for."""
    stock_models.write_all(comfyui.base / "models")
    return comfyui


@pytest.fixture(scope="module")
def nodes(server) -> dict:
    return server.get("/object_info")


@pytest.fixture(scope="module")
def find(server):
    """Where `adopt` finds the file that a loader names."""

    def found(part: str, name: str):
        places = (server.base / "models" / folder / stock_models.FOLDER / name for folder in FOLDERS[part])
        return next((place for place in places if place.is_file()), None)

    return found


@pytest.fixture(scope="module")
def by_core(server, nodes):
    """`by_core(name)`: the latent that a template makes with core's own loaders."""
    made = {}

    def latent(name: str) -> torch.Tensor:
        if name not in made:
            made[name] = run(server, stock.prompt(stock.workflow(name), nodes))
        return made[name]

    return latent


def run(server, graph: dict) -> torch.Tensor:
    stock.draw_inputs(graph, server.base / "input")
    return graphs.saved_latent(server, server.queue(graph), stock.SAVED)


@pytest.mark.parametrize("name", stock.NAMES)
def test_all_loaders_are_swapped_and_back(find, name):
    shown = stock.workflow(name)
    done = adopt(shown, find)
    assert done.left == () and {node.type for node in done.swapped} <= LOADERS
    assert len(done.swapped) == sum(node["type"] in LOADERS for node in stock.nodes_of(shown))
    assert give_back(done.graph).graph == shown


@pytest.mark.parametrize("name", stock.NAMES)
@pytest.mark.parametrize("ranks", [2, 1])
def test_the_latent_is_that_of_cores_loaders(server, nodes, find, by_core, record_property, request, ranks, name):
    if lacking := stock.missing(name, nodes):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    extra = name in ALL_ONLY or (ranks == 1 and name not in ON_ONE_RANK)
    if extra and not request.config.getoption("--all-stock"):
        pytest.skip("with --all-stock only")
    core = by_core(name)
    ours = run(server, stock.on_ranks(stock.prompt(adopt(stock.workflow(name), find).graph, nodes), ranks))
    error = ((ours - core).abs().max() / core.abs().max()).item()
    shown = f"{name.removeprefix('+')} ({'newest' if name.startswith('+') else 'of ComfyUI 0.3.75'})"
    record_property("shown", f"template {shown}, {ranks} rank(s): {error:.0e} of the largest value of core's latent")
    assert core.isfinite().all() and core.std() > 0.1
    assert ours.shape == core.shape and error <= TOLERANCE
