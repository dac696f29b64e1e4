"""A real ComfyUI makes videos with the pack: progress, previews, outputs, and ranks that stay."""

import os
import signal
from pathlib import Path

import av
import comfy_graphs as graphs
import pytest
import torch
from benchmarks.opens import Opened
from comfy_listener import Listener
from rank_processes import ranks_of, seconds_until


@pytest.fixture
def listener(comfyui):
    with Listener(comfyui) as listening:
        yield listening


def frames_of(file) -> list:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_shipped_workflow_makes_a_video(comfyui, listener):
    """The embedded model's workflow as it is shipped, but with zeros for what the model knows itself: its 20 steps."""
    graph = graphs.video(model="embedded/tiny_wan", length=17, steps=0, cfg=0.0, shift=0.0)
    run = listener.run(graph, timeout=300)
    reported = run.progress(graphs.SAMPLER)
    loads, steps = reported[:-20], reported[-20:]
    assert loads == [(percent, 100) for percent, _ in sorted(loads)] and loads[-1] == (100, 100)
    assert steps == [(step, 20) for step in range(1, 21)]
    file = graphs.saved(comfyui, run.prompt_id)
    assert file.suffix == ".mp4"
    frames = frames_of(file)
    assert len(frames) == 17 and frames[0].shape == (64, 64, 3)


def test_progress_and_previews_come_by_step(comfyui, listener):
    graph = graphs.latent(steps=5, size=96)
    graph[graphs.EMPTY]["inputs"]["height"] = 64
    run = listener.run(graph)
    assert run.progress(graphs.SAMPLER)[-5:] == [(step, 5) for step in range(1, 6)]
    previews = run.of("preview", graphs.SAMPLER)
    assert len(previews) == 5
    for preview in previews:  # ComfyUI enlarges them to 512 pixels
        assert preview.data["image"].format == "JPEG" and preview.data["image"].size == (512, 341)
    pixels = [preview.data["image"].tobytes() for preview in previews]
    assert len(set(pixels)) == 5, "each step has a picture of its own"


def test_second_run_reads_no_weights_and_keeps_the_ranks(comfyui, listener, checkpoint):
    first = listener.run(graphs.video(seed=1))
    before = ranks_of(comfyui.process.pid)
    with Opened(checkpoint.rglob("*.safetensors")) as opened:
        second = listener.run(graphs.video(seed=2))
    assert opened.files() == []
    assert ranks_of(comfyui.process.pid) == before and before
    assert graphs.SAMPLER not in second.cached() and graphs.MODEL in second.cached()
    one, two = (frames_of(graphs.saved(comfyui, run.prompt_id)) for run in (first, second))
    assert len(one) == len(two) == 9
    assert any((a != b).any() for a, b in zip(one, two)), "another seed, another video"


def test_the_watch_on_weights_sees_a_load(comfyui, listener, checkpoint):
    """The test above proves nothing if a load goes unseen."""
    listener.run({"1": {"class_type": "AscendFreeMemory", "inputs": {"what": "weights"}}})
    graph = graphs.video(seed=3)
    graph[graphs.POSITIVE]["inputs"]["text"] = "a prompt that no rank knows yet"
    with Opened(checkpoint.rglob("*.safetensors")) as opened:
        listener.run(graph)
    assert {file.parent.name for file in opened.files()} == {"text_encoder", "transformer", "vae"}


def test_the_seed_decides_on_any_number_of_ranks(comfyui, listener):
    latents = []
    for cfg_degree, ulysses_degree in ((1, 1), (2, 1), (1, 2)):
        graph = graphs.latent(seed=7, ranks=cfg_degree * ulysses_degree)
        graph[graphs.PARALLEL]["inputs"].update(cfg_degree=cfg_degree, ulysses_degree=ulysses_degree)
        run = listener.run(graph)
        assert graphs.SAMPLER not in run.cached()
        assert len(ranks_of(comfyui.process.pid)) == cfg_degree * ulysses_degree
        assert f"cfg_degree {cfg_degree}, ring_degree 1, ulysses_degree {ulysses_degree}, tp_degree 1" in comfyui.log
        latents.append(graphs.saved_latent(comfyui, run.prompt_id))
    errors = [(other - latents[0]).abs().max().item() for other in latents[1:]]
    print(f"one rank and cfg 2 differ by at most {errors[0]:.1e}, one rank and Ulysses 2 by {errors[1]:.1e}")
    assert max(errors) <= 1e-4 and latents[0].std() > 0.1


def test_a_handle_outlives_its_ranks(comfyui, listener):
    """ComfyUI has cached the loaders' outputs; the ranks they were made for are gone."""
    reference = graphs.saved_latent(comfyui, listener.run(graphs.latent(seed=11)).prompt_id)
    listener.run(graphs.latent(seed=12))
    before = ranks_of(comfyui.process.pid)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    seconds_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before.values()), timeout=10)
    run = listener.run(graphs.latent(seed=11))
    assert {graphs.MODEL, graphs.ENCODER, graphs.POSITIVE} <= run.cached() and graphs.SAMPLER not in run.cached()
    assert not set(before.values()) & set(ranks_of(comfyui.process.pid).values())
    assert torch.equal(graphs.saved_latent(comfyui, run.prompt_id), reference)


def test_two_groups_of_ranks_in_one_graph_are_named(comfyui, listener):
    """Each ends the other in every run; two runs with other numbers are a user's change of mind."""
    said = "This graph asks for two groups of ranks, 2 on cpu and 1 on cpu."
    graph = graphs.latent(seed=21)
    graph["one rank"] = {**graph[graphs.PARALLEL], "inputs": {**graph[graphs.PARALLEL]["inputs"], "ranks": 1}}
    graph[graphs.POSITIVE]["inputs"]["text"] = "a prompt for two ranks"
    listener.run(graphs.latent(seed=22))
    assert said not in comfyui.log
    graph[graphs.MODEL]["inputs"]["parallel"] = ["one rank", 0]
    listener.run(graph)
    assert said in comfyui.log and "Connect one Ascend Parallel Config to all Ascend loaders" in comfyui.log
    assert any(said in event.data["text"] for event in listener.events if event.kind == "text")
