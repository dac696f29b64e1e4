"""The accelerators' nodes through ComfyUI's API: what they skip, report and refuse."""

import re

import av
import comfy_graphs as graphs
import pytest
import torch
from ascend_runtime.specs.presets import FIELDS, PRESETS
from comfy_listener import Listener
from scripts.lib.comfy_server import PromptFailed

ATTENTION, BLOCKS, STEPS, RAIN = NODES = (
    "AscendAttentionCache", "AscendBlockCache", "AscendStepCache", "AscendRainFusion"
)  # fmt: skip
MOST = {"preset": "custom", "start": 0, "end": 3, "interval": 4}  # a cache reuses 3 of 4 steps, the most it can
EMBEDDED = "embedded/tiny_wan"
FIRST, SECOND = "30", "31"


@pytest.fixture(scope="module")
def listener(comfyui):
    with Listener(comfyui) as listening:
        yield listening


def accelerated(graph: dict, *nodes: tuple) -> dict:
    """The graph with these nodes (type, widgets) in a chain."""
    before = None
    for number, (kind, widgets) in zip((FIRST, SECOND), nodes):
        graph[number] = {"class_type": kind, "inputs": {**widgets, **({"acceleration": before} if before else {})}}
        before = [number, 0]
    graph[graphs.SAMPLER]["inputs"]["acceleration"] = before
    return graph


def report_of(comfyui, run) -> list[str]:
    """The lines of the sampler's report, which are the same in the history and on the page."""
    (text,) = comfyui.wait(run.prompt_id)["outputs"][graphs.SAMPLER]["text"]
    assert run.of("executed", graphs.SAMPLER)[-1].data["output"]["text"] == [text]
    return text.splitlines()


@pytest.fixture(scope="module")
def plain(comfyui, listener):
    run = listener.run(graphs.latent(seed=5, steps=4))
    assert re.fullmatch(r"Took .*4 steps [\d.]+ s \([\d.]+ s each.*\)\.", report_of(comfyui, run)[-1])
    return graphs.saved_latent(comfyui, run.prompt_id)


@pytest.mark.parametrize("node, kind", list(zip(NODES, FIELDS)))
def test_the_widgets_are_the_fields_of_the_description(comfyui, node, kind):
    inputs = comfyui.get(f"/object_info/{node}")[node]["input"]
    widgets = [*inputs["required"], *inputs["optional"]]
    assert widgets[0] == "preset" and widgets[-1] == "acceleration"
    assert set(widgets[1:-1]) == set(FIELDS[kind])


@pytest.mark.parametrize("kind", NODES)
def test_every_preset_makes_a_video(comfyui, listener, kind):
    """All of a node in one prompt."""
    graph = graphs.video(EMBEDDED, length=5, steps=3)
    del graph[graphs.VIDEO], graph[graphs.SAVE]
    for number, preset in enumerate((*PRESETS, "custom"), start=40):
        sampler, decode, video, save, node = (f"{number}{part}" for part in "abcde")
        graph[node] = {"class_type": kind, "inputs": {"preset": preset}}
        inputs = {**graph[graphs.SAMPLER]["inputs"], "acceleration": [node, 0]}
        graph[sampler] = {"class_type": "AscendSampler", "inputs": inputs}
        graph[decode] = {"class_type": "AscendVAEDecode", "inputs": {"samples": [sampler, 0], "vae": [graphs.VAE, 0]}}
        graph[video] = {"class_type": "CreateVideo", "inputs": {"fps": 16, "images": [decode, 0]}}
        widgets = {"filename_prefix": "video/preset", "format": "auto", "codec": "auto"}
        graph[save] = {"class_type": "SaveVideo", "inputs": {**widgets, "video": [video, 0]}}
    del graph[graphs.SAMPLER], graph[graphs.DECODE]
    run = listener.run(graph)
    for number in range(40, 40 + len(PRESETS) + 1):
        with av.open(str(graphs.saved(comfyui, run.prompt_id, f"{number}d"))) as container:
            assert len(list(container.decode(video=0))) == 5
        (text,) = comfyui.wait(run.prompt_id)["outputs"][f"{number}a"]["text"]
        assert re.search(r"reused earlier results|of attention left out|nothing saved", text)


@pytest.mark.parametrize("kind", NODES[:2])
def test_a_cache_changes_the_video_and_reports_what_it_saved(comfyui, listener, plain, kind):
    run = listener.run(accelerated(graphs.latent(seed=5, steps=4), (kind, MOST)))
    latent = graphs.saved_latent(comfyui, run.prompt_id)
    assert latent.shape == plain.shape and not torch.equal(latent, plain)
    name = {ATTENTION: "AttentionCache", BLOCKS: "block cache"}[kind]
    words = rf"{name}: 3 of 4 steps reused earlier results; (\d+) % less to compute, (.*)"
    saved, faster = re.fullmatch(words, report_of(comfyui, run)[-1]).groups()
    assert int(saved) > 0 and re.fullmatch(
        r"[\d.]+ times as fast, [\d.]+ s saved\.|[\d.]+ times as fast by calculation\.|"
        r"but no faster \([\d.]+ times\)\.", faster
    )  # fmt: skip
    assert "'steps_reusing'" not in comfyui.log


def test_an_accelerator_that_skips_nothing_changes_no_video(comfyui, listener, plain):
    """interval 1 reuses nothing; RainFusion that begins after the last step is never sparse."""
    nodes = [(ATTENTION, {"preset": "custom", "interval": 1}), (RAIN, {"preset": "custom", "start": 1000})]
    run = listener.run(accelerated(graphs.latent(seed=5, steps=4), *nodes))
    assert torch.equal(graphs.saved_latent(comfyui, run.prompt_id), plain)
    words = "AttentionCache and RainFusion v2: 0 of 4 steps reused earlier results, 0 % of attention left out; "
    assert report_of(comfyui, run)[-1] == f"{words}nothing saved."


@pytest.mark.parametrize("first, second, says", [
    (ATTENTION, STEPS, "attention cache and step cache are given; use only one of them"),
    (BLOCKS, ATTENTION, "attention cache and block cache are given; use only one of them"),
    (RAIN, RAIN, "rainfusion is given twice; use only one"),
])  # fmt: skip
def test_a_chain_that_excludes_itself_is_refused(listener, first, second, says):
    nodes = [(first, {"preset": "fast"}), (second, {"preset": "quality"})]
    with pytest.raises(PromptFailed, match=says) as caught:
        listener.run(accelerated(graphs.latent(seed=6), *nodes))
    assert caught.value.details["node_id"] == SECOND, "it is the node that says so"


@pytest.mark.parametrize("kind, widgets, says", [
    (ATTENTION, {"interval": 0}, "interval is 0; give 1 to"),
    (ATTENTION, {"start": 20, "end": 10}, "start is 20 and end is 10; end must not come before start"),
    (ATTENTION, {"ratio": 0.5}, "ratio is 0.5; give a speed-up from 1 to 10"),
    (BLOCKS, {"first_block": 3, "last_block": 1}, "the last must not come before the first"),
    (STEPS, {"method": "deepcache"}, "it can be one of fbcache"),
    (STEPS, {"order": 5}, "order is 5; give 0 to 4"),
    (RAIN, {"sparsity": 1.0}, "sparsity is 1.0; give 0 (dense) to less than 1"),
    (RAIN, {"preset": "best"}, "it can be one of quality, balanced, fast, custom"),
])  # fmt: skip
def test_wrong_widgets_are_refused_before_the_graph_runs(comfyui, kind, widgets, says):
    graph = accelerated(graphs.latent(), (kind, {"preset": "custom", **widgets}))
    assert says in graphs.refusal(comfyui, graph, FIRST)


def test_an_input_that_the_node_lacks_is_refused(comfyui, listener):
    """ComfyUI passes a link under any name, but only when the graph runs."""
    graph = accelerated(graphs.latent(seed=8), (ATTENTION, {"preset": "fast", "sparsity": ["40", 0]}))
    graph["40"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.5}}
    with pytest.raises(PromptFailed, match="Ascend AttentionCache has no sparsity; its widgets are preset, ratio"):
        listener.run(graph)


def test_a_preset_ignores_the_other_widgets(comfyui, listener):
    """Also if their values are illegal."""
    latents = []
    for widgets in ({}, {"start": 3, "end": 1, "interval": 0}):
        run = listener.run(accelerated(graphs.latent(seed=7, steps=4), (ATTENTION, {"preset": "balanced", **widgets})))
        latents.append(graphs.saved_latent(comfyui, run.prompt_id))
    assert torch.equal(*latents)
