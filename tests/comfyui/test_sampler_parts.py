"""Ascend Sampler (Advanced): two in a row are one Ascend Sampler, and either can be core's KSamplerAdvanced."""

import itertools

import comfy_graphs as graphs
import pytest
import torch
from ascend_runtime.specs.jobs import SOLVERS
from stock_graphs import MODEL, Graph, difference, loaded

STEPS, SEED, SHIFT = 5, 3, 5.0
SETTINGS = {"steps": STEPS, "cfg": 3.0, "scheduler": "simple"}
PARTS = {
    "first": {"add_noise": "enable", "start_at_step": 0, "return_with_leftover_noise": "enable"},
    "second": {"add_noise": "disable", "end_at_step": 10000, "return_with_leftover_noise": "disable"},
    "ended": {"add_noise": "enable", "start_at_step": 0, "return_with_leftover_noise": "disable"},
}


class Samplers:
    """Nodes of one graph, by which part of the steps they compute and whose they are."""

    def __init__(self):
        self.graph = graph = Graph()
        core, stock = (graph.add("ModelSamplingSD3", model=loaded(graph, ours), shift=SHIFT) for ours in (False, True))
        own = graphs.latent()[graphs.MODEL]["inputs"] | {"model_name": MODEL, "parallel": self._parallel()}
        self._models = {"core": core, "stock": stock, "ours": graph.add("AscendLoadDiffusionModel", **own)}
        self._shared = {**SETTINGS, "positive": graph.text(1), "negative": graph.text(2)}

    def _parallel(self):
        return self.graph.add("AscendParallelConfig", ranks=2, cfg_degree=0, ulysses_degree=0, device="cpu")

    def part(self, whose, which, latent, solver="euler", cut=2, **changes):
        step = {"start_at_step": cut} if which == "second" else {"end_at_step": cut}
        inputs = {**self._shared, "model": self._models[whose], "sampler_name": solver, "latent_image": latent,
                  "noise_seed": SEED, **PARTS[which], **step, **changes}  # fmt: skip
        if whose == "ours":
            return self.graph.add("AscendSamplerAdvanced", shift=SHIFT, **inputs)
        return self.graph.add("KSamplerAdvanced", **inputs)

    def two(self, first, second, solver="euler", cut=2):
        noisy = self.part(first, "first", self.graph.empty(), solver, cut)
        return self.part(second, "second", noisy, solver, cut, noise_seed=SEED + 1)  # adds no noise: has no effect

    def one(self, solver):
        return self.graph.add("AscendSampler", model=self._models["ours"], sampler_name=solver, seed=SEED, shift=SHIFT,
                              latent_image=self.graph.empty(), **self._shared)  # fmt: skip


def latents(comfyui, graph, made):
    for name, link in made.items():
        graph.save(name, link)
    prompt = comfyui.queue(graph)
    return {name: graphs.saved_latent(comfyui, prompt, name) for name in made}


def test_two_are_one_with_every_solver_and_either_may_be_cores(comfyui):
    samplers = Samplers()
    pairs = {f"{one}, {other}": samplers.two(one, other)
             for one, other in itertools.product(("core", "stock", "ours"), repeat=2)}  # fmt: skip
    for solver, cut in zip(SOLVERS, (1, 2, 4)):
        pairs[f"two by {solver}"] = samplers.two("ours", "ours", solver, cut)
        pairs[f"one by {solver}"] = samplers.one(solver)
    found = latents(comfyui, samplers.graph, pairs)
    core = found["core, core"]
    assert core.std() > 0.1
    for name, latent in found.items():
        if ", " in name:
            print(f"{name}: {difference(core, latent):.1e}")
            assert difference(core, latent) <= 1e-3, name
    for solver in SOLVERS:
        assert torch.equal(found[f"two by {solver}"], found[f"one by {solver}"]), solver
    assert difference(core, found["one by euler"]) <= 1e-3


def test_each_widget_does_what_cores_does(comfyui):
    """A part that ends without noise; noise that is added to a latent at a step; none, on a latent of zeros; a part
    without a step; and latents with noise, as they go from node to node."""
    samplers, made = Samplers(), {}
    for whose in ("core", "ours"):
        empty = samplers.graph.empty()
        noisy = samplers.part(whose, "first", empty)
        made |= {f"{whose}: {name}": link for name, link in {
            "noisy": noisy,
            "ended": samplers.part(whose, "ended", empty),
            "noise added": samplers.part(whose, "second", samplers.part("ours", "ended", empty), add_noise="enable"),
            "zeros": samplers.part(whose, "second", empty),
            "zeros from the first step": samplers.part(whose, "second", empty, cut=0),
            "no step": samplers.part(whose, "second", noisy, cut=STEPS),
            "no step before another": samplers.part(whose, "second", noisy, cut=3, end_at_step=3),
        }.items()}  # fmt: skip
    found = latents(comfyui, samplers.graph, made)
    for name in (name.removeprefix("core: ") for name in made if name.startswith("core")):
        core, ours = (found[f"{whose}: {name}"] for whose in ("core", "ours"))
        print(f"{name}: {difference(core, ours):.1e}")
        assert core.isfinite().all() and core.std() > 0.01 and difference(core, ours) <= 1e-3, name
    assert torch.equal(found["ours: no step"], found["ours: noisy"])


@pytest.mark.parametrize("solver", SOLVERS)
def test_after_a_node_that_changes_the_latent_the_solver_begins_again(comfyui, solver):
    samplers = Samplers()
    noisy = samplers.part("ours", "first", samplers.graph.empty(), solver, cut=3)
    changed = samplers.graph.add("LatentMultiply", samples=noisy, multiplier=1.0)
    second = samplers.part("ours", "second", changed, solver, cut=3)
    found = latents(comfyui, samplers.graph, {"changed": second, "one": samplers.one(solver)})
    apart = difference(found["one"], found["changed"])
    print(f"{solver}: {apart:.1e}")
    assert found["changed"].isfinite().all() and (apart < 1e-5) == (solver == "euler")
