"""Operators, warm-up and profiler by way of ComfyUI's API."""

import json
from pathlib import Path

import comfy_graphs as graphs
import pytest
import torch
from comfy_listener import Listener

OPTIONS = ("attention", "heads_per_call", "warm_up")
PROFILER = "20"


@pytest.fixture
def listener(comfyui):
    with Listener(comfyui) as listening:
        yield listening


def with_profiler(graph: dict, **changes) -> dict:
    inputs = {"folder": "profiles/test", "first_step": 2, "last_step": 3, "rank": 1, **changes}
    graph[PROFILER] = {"class_type": "AscendProfiler", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["profile"] = [PROFILER, 0]
    return graph


def without_options(graph: dict) -> dict:
    for name in OPTIONS:
        del graph[graphs.MODEL]["inputs"][name]
    return graph


@pytest.fixture(scope="module")
def plain(comfyui) -> torch.Tensor:
    """The latent of a graph from before there were options."""
    prompt = comfyui.queue(without_options(graphs.latent(seed=21, steps=4)))
    return graphs.saved_latent(comfyui, prompt)


def test_all_options_change_no_video(comfyui, listener, plain):
    listener.run({"1": {"class_type": "AscendFreeMemory", "inputs": {"what": "weights"}}})
    graph = with_profiler(graphs.latent(seed=21, steps=4))
    graph[graphs.MODEL]["inputs"].update(attention="plain", warm_up=True)
    run = listener.run(graph)
    assert torch.equal(graphs.saved_latent(comfyui, run.prompt_id), plain) and plain.std() > 0.1
    # The warm-up's first step too, unless ComfyUI leaves out what comes within 0.1 s and has no picture (0.33.0).
    assert run.progress(graphs.SAMPLER)[-5:] == [(2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(run.of("preview", graphs.SAMPLER)) == 4, "none of the warm-up"
    (folder,) = (comfyui.output / "profiles" / "test").iterdir()
    (file,) = folder.iterdir()
    names = {event["name"] for event in json.loads(Path(file).read_text())["traceEvents"]}
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names
    assert f"Recorded steps 2 to 3 on rank 1: {folder}" in comfyui.log
    assert "warm-up took" in comfyui.log and ", warm up " in comfyui.log


def test_a_warm_model_is_not_warmed_up_again(listener):
    for seed, warms_up in ((31, True), (32, False)):
        graph = graphs.latent(seed=seed, size=96, steps=3)
        graph[graphs.MODEL]["inputs"]["warm_up"] = True
        assert ((2, 2) in listener.run(graph).progress(graphs.SAMPLER)) == warms_up


@pytest.mark.parametrize("changes, says", [
    ({"folder": "../models"}, "no '..'"),
    ({"folder": "a/../../models"}, "no '..'"),
    ({"folder": "/tmp/profiles"}, "no absolute path"),
    ({"folder": " "}, "give the name of a folder"),
    ({"first_step": 4}, "last_step is 3; it must be between 4 and"),
])  # fmt: skip
def test_what_the_profiler_refuses(comfyui, changes, says):
    assert says in graphs.refusal(comfyui, with_profiler(graphs.latent(), **changes), PROFILER)
