"""What cannot work is refused by name, with what can: at validation where ComfyUI can know, else by the job; and the
ranks live on."""

from itertools import count

import comfy_graphs as graphs
import pytest
import torch
from comfy_listener import Listener
from scripts.lib.comfy_server import PromptFailed
from rank_processes import ranks_of


@pytest.mark.parametrize("widget", ["model_name", "low_noise_model_name"])
def test_a_model_that_is_not_there(comfyui, widget):
    graph = graphs.video()
    graph[graphs.MODEL]["inputs"][widget] = "no_such_model"
    text = graphs.refusal(comfyui, graph, graphs.MODEL)
    assert "AV-1301: There is no model 'no_such_model'" in text and "docs/errors.md" in text
    assert "random_wan" in text and "embedded/tiny_wan" in text and "original_wan.safetensors" in text
    assert "models/diffusers" in text


@pytest.mark.parametrize("node", [graphs.ENCODER, graphs.VAE])
def test_a_folder_that_is_not_there(comfyui, node):
    graph = graphs.video()
    graph[node]["inputs"]["model_name"] = "no_such_folder"
    text = graphs.refusal(comfyui, graph, node)
    assert "There is no model 'no_such_folder'" in text and "random_wan" in text


def test_degrees_that_do_not_make_the_ranks(comfyui):
    graph = graphs.video()
    graph[graphs.PARALLEL]["inputs"].update(ranks=4, cfg_degree=2, ulysses_degree=4)
    text = graphs.refusal(comfyui, graph, graphs.PARALLEL)
    assert "cfg_degree 2 x ring_degree auto x ulysses_degree 4 x tp_degree 1 does not match 4 ranks" in text
    assert "1 x 1 x 4 x 1" in text


def test_a_third_branch(comfyui):
    graph = graphs.video()
    graph[graphs.PARALLEL]["inputs"].update(ranks=3, cfg_degree=3)
    text = graphs.refusal(comfyui, graph, graphs.PARALLEL)
    assert "3" in text and ("1 or 2" in text or "max of 2" in text)


def width_72(graph):
    inputs = {"width": 72, "height": 64, "length": 9, "batch_size": 1}
    graph[graphs.EMPTY] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": inputs}


def text_of_another_encoder(graph):
    graph[graphs.ENCODER]["inputs"]["model_name"] = "wide_text_encoder"


def latent_of_32_channels(graph):
    graph[graphs.EMPTY] = {
        "class_type": "EmptyHunyuanVideo15Latent",
        "inputs": {"width": 128, "height": 128, "length": 9, "batch_size": 1},
    }


def latent_of_an_image(graph):
    graph[graphs.EMPTY] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}


def batch_index(graph):
    inputs = {"samples": [graphs.EMPTY, 0], "batch_index": 0, "length": 1}
    graph["20"] = {"class_type": "LatentFromBatch", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["latent_image"] = ["20", 0]


def conditioning_for_a_part_of_the_steps(graph):
    inputs = {"conditioning": [graphs.POSITIVE, 0], "start": 0.0, "end": 0.5}
    graph["20"] = {"class_type": "ConditioningSetTimestepRange", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["positive"] = ["20", 0]


def two_conditionings(graph):
    inputs = {"conditioning_1": [graphs.POSITIVE, 0], "conditioning_2": [graphs.NEGATIVE, 0]}
    graph["20"] = {"class_type": "ConditioningCombine", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["positive"] = ["20", 0]


def no_negative(graph):
    del graph[graphs.SAMPLER]["inputs"]["negative"]


def sigmas_of_another_kind_of_model(graph):
    inputs = {"steps": 2, "sigma_max": 14.0, "sigma_min": 0.5, "rho": 7.0}
    graph["20"] = {"class_type": "KarrasScheduler", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["sigmas"] = ["20", 0]


REFUSED = {
    width_72: ["width is 72", "64 and 80"],
    text_of_another_encoder: ["[1, 512, 4096]", "[1, tokens, 32]", "text encoder that belongs to the model"],
    latent_of_32_channels: ["[1, 32, 3, 8, 8]", "[B,16,T,H,W]", "EmptyHunyuanLatentVideo"],
    latent_of_an_image: ["[1, 4, 8, 8]", "[B,16,T,H,W]", "EmptyHunyuanLatentVideo"],
    batch_index: ["batch_index", "Leave it out"],
    conditioning_for_a_part_of_the_steps: ["positive", "end_percent", "start_percent", "text encode node directly"],
    two_conditionings: ["2 parts", "one text"],
    no_negative: ["needs a negative prompt", "guidance_scale to 1"],
    sigmas_of_another_kind_of_model: ["sigmas are [14.0", "from at most 1 down"],
}


@pytest.fixture(scope="module")
def good(comfyui):
    """Makes graphs of one video, each of which ComfyUI has not run yet; and its latent."""
    numbers = count(1)

    def graph() -> dict:
        return graphs.latent(seed=5, cfg_low_noise=next(numbers))  # of an expert that the model has not

    return graph, graphs.saved_latent(comfyui, comfyui.queue(graph()))


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_the_job_is_refused_and_the_ranks_live_on(comfyui, good, spoil):
    new_graph, expected = good
    spoilt = graphs.latent(seed=6)
    spoil(spoilt)
    before = ranks_of(comfyui.process.pid)
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(spoilt))
    details = caught.value.details
    assert details["exception_type"] == "ValueError" and details["node_type"] == "AscendSampler"
    for part in REFUSED[spoil]:
        assert part in details["exception_message"]
    assert ranks_of(comfyui.process.pid) == before and len(before) == 2
    with Listener(comfyui) as listener:
        run = listener.run(new_graph())
    assert graphs.SAMPLER not in run.cached()
    assert torch.equal(graphs.saved_latent(comfyui, run.prompt_id), expected)
    assert ranks_of(comfyui.process.pid) == before
