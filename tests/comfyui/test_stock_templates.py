"""ComfyUI's own templates, their loaders swapped for ours: the latent is that of core's own loaders."""

import comfy_graphs as graphs
import pytest
import stock_models
import stock_templates as stock
import torch

TOLERANCE = 1e-4  # of the latent's largest value


@pytest.fixture(scope="module")
def server(comfyui):
    """The `comfyui` with models and pictures under the names that templates ask for, and what its nodes are."""
    stock_models.write_all(comfyui.base / "models")
    return comfyui


@pytest.fixture(scope="module")
def nodes(server) -> dict:
    return server.get("/object_info")


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
    return graphs.saved_latent(server, server.queue(graph), "saved")


def renamed(graph, nodes):
    for node in graph.values():
        if node["class_type"] in ("UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader") and "Ascend"+node["class_type"] in nodes:
            node["class_type"] = "Ascend" + node["class_type"]
    return graph

@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("name", stock.NAMES)
def test_the_latent_is_that_of_cores_loaders(server, nodes, by_core, ranks, name):
    if lacking := stock.missing(name, nodes):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    core = by_core(name)
    ours = run(server, stock.on_ranks(renamed(stock.prompt(stock.workflow(name), nodes), nodes), ranks))
    error = ((ours - core).abs().max() / core.abs().max()).item()
    print(f"{name} on {ranks} ranks: {error:.1e} of core's largest value {core.abs().max():.1f}")
    assert core.isfinite().all() and core.std() > 0.1
    assert error <= TOLERANCE
