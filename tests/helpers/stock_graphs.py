"""Stock graphs in API format: core's nodes, whose loaders are core's own or ours."""

import itertools
import uuid

import comfy_graphs as graphs
import torch

MODEL = "original_wan.safetensors"
TEXT_DIM = 4096


class Graph(dict):
    """A graph to which nodes are added one by one: `link = graph.add("CLIPLoader", clip_name=...)`."""

    def __init__(self):
        super().__init__()
        self._numbers = itertools.count(1)

    def add(self, class_type: str, output: int = 0, **inputs) -> list:
        """Adds a node; the link to one of its outputs. Inputs with dots in their names: as `**{"a.b": 1}`."""
        number = str(next(self._numbers))
        self[number] = {"class_type": class_type, "inputs": inputs}
        return [number, output]

    def text(self, seed: int, tokens: int = 20, width: int = TEXT_DIM, pooled: int = 8) -> list:
        """A random CONDITIONING."""
        return self.add("TestRandomText", seed=seed, tokens=tokens, width=width, pooled=pooled)

    def empty(self, length: int = 9, size: int = 64, batch: int = 1, height: int | None = None) -> list:
        return self.add("EmptyHunyuanLatentVideo", width=size, height=height or size, length=length, batch_size=batch)

    def save(self, name: str, latent: list) -> None:
        """Saves a LATENT as the output node `name`, also if it was saved before."""
        self[name] = graphs.save_latent(latent)
        self[name]["inputs"]["filename_prefix"] = f"stock/{uuid.uuid4().hex}"


def sampled(graph: Graph, model: list, **changes) -> list:
    """KSampler on a MODEL: two texts, a small video, 2 steps of euler at cfg 4. changes: of its inputs."""
    inputs = {"seed": 3, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs |= {name: make() for name, make in {
        "positive": lambda: graph.text(1), "negative": lambda: graph.text(2), "latent_image": graph.empty,
    }.items() if name not in changes}  # fmt: skip
    return graph.add("KSampler", model=model, **inputs | changes)


def loaded(graph: Graph, ours: bool, ranks: int = 2, name: str = MODEL) -> list:
    """The MODEL of core's UNETLoader, or of ours."""
    if not ours:
        return graph.add("UNETLoader", unet_name=name, weight_dtype="default")
    return graph.add("AscendUNETLoader", unet_name=name, weight_dtype="default", parallel=parallel(graph, ranks))


def parallel(graph: Graph, ranks: int) -> list:
    return graph.add("AscendParallelConfig", ranks=ranks, cfg_degree=0, ulysses_degree=0, device="cpu")


def twins(make, ranks: int = 2, name: str = MODEL) -> Graph:
    """A graph that makes a latent twice, on core's MODEL ("core") and on ours ("ours").

    make: (graph, MODEL) -> LATENT, from any nodes.
    """
    graph = Graph()
    for save, ours in (("core", False), ("ours", True)):
        graph.save(save, make(graph, loaded(graph, ours, ranks, name)))
    return graph


def apart(server, graph: dict, one: str = "core", other: str = "ours") -> float:
    """How far two saved latents of a graph are apart: the largest difference over the largest value."""
    prompt = server.queue(graph)
    first, second = (graphs.saved_latent(server, prompt, node) for node in (one, other))
    assert first.shape == second.shape and first.isfinite().all()
    return difference(first, second)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max()).item()
