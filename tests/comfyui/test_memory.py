"""Memory that is given back when ComfyUI asks: the weights of the ranks, or the ranks."""

import os
import signal
import time

import comfy_graphs as graphs
import pytest
import torch
from ascend_runtime.client.submission import CANCEL_DEADLINE
from comfy_listener import Listener
from rank_processes import ranks_of, resident_mb, seconds_until

HEAVY_MB = 101  # of random_wan.heavy_transformer


def heavy(seed: int) -> dict:
    return graphs.heavy_latent(seed=seed, steps=1)


def then_free(graph: dict, what: str) -> dict:
    """The graph with Ascend Free Memory behind its sampler."""
    free = {"class_type": "AscendFreeMemory", "inputs": {"what": what, "anything": [graphs.SAMPLER, 0]}}
    return {**graph, "20": free, graphs.SAVE: graphs.save_latent(["20", 0])}


@pytest.mark.parametrize("request_body", [{"unload_models": True}, {"unload_models": True, "free_memory": True}])
def test_comfyuis_own_request_drops_the_weights(comfyui, request_body):
    with Listener(comfyui) as listener:
        expected = graphs.saved_latent(comfyui, listener.run(heavy(1)).prompt_id)
        ranks = ranks_of(comfyui.process.pid)
        assert len(ranks) == 2
        loaded = {pid: resident_mb(pid) for pid in ranks.values()}
        comfyui.post("/free", request_body)
        given_back = lambda: all(loaded[pid] - resident_mb(pid) > 0.9 * HEAVY_MB for pid in loaded)  # noqa: E731
        seconds_until(given_back, timeout=20)
        print(", ".join(f"rank {r}: {loaded[pid]:.0f} -> {resident_mb(pid):.0f} MB" for r, pid in ranks.items()))
        listener.run(heavy(2))
        again = listener.run(heavy(1))
        assert graphs.SAMPLER not in again.cached()
        assert torch.equal(graphs.saved_latent(comfyui, again.prompt_id), expected)
        assert ranks_of(comfyui.process.pid) == ranks


def test_free_before_any_job_and_twice_is_no_error(comfyui):
    for _ in range(2):
        comfyui.post("/free", {"unload_models": True})
    comfyui.wait(comfyui.queue(graphs.latent(seed=3)))


def test_node_drops_the_weights(comfyui):
    comfyui.wait(comfyui.queue(heavy(4)))
    ranks = ranks_of(comfyui.process.pid)
    loaded = {pid: resident_mb(pid) for pid in ranks.values()}
    comfyui.wait(comfyui.queue(then_free(heavy(4), "weights")))
    assert all(loaded[pid] - resident_mb(pid) > 0.9 * HEAVY_MB for pid in loaded)
    assert ranks_of(comfyui.process.pid) == ranks


def test_node_ends_the_ranks(comfyui):
    prompt = comfyui.queue(then_free(graphs.latent(seed=5), "ranks"))
    first = graphs.saved_latent(comfyui, prompt)
    assert ranks_of(comfyui.process.pid) == {}
    comfyui.wait(comfyui.queue(graphs.latent(seed=6)))
    assert len(ranks_of(comfyui.process.pid)) == 2
    again = graphs.saved_latent(comfyui, comfyui.queue(graphs.latent(seed=5)))
    assert torch.equal(first, again)


def test_dead_ranks_do_not_take_comfyuis_worker_along(comfyui):
    """ComfyUI frees in a thread that ends for good with any exception."""
    comfyui.wait(comfyui.queue(graphs.latent(seed=7)))
    rank, _ = ranks_of(comfyui.process.pid).values()
    os.kill(rank, signal.SIGSTOP)
    comfyui.post("/free", {"unload_models": True})
    time.sleep(2.0)  # ComfyUI's worker takes the request up, and waits for the rank
    os.kill(rank, signal.SIGKILL)
    comfyui.wait(comfyui.queue(graphs.latent(seed=8)), timeout=120)
    assert rank not in ranks_of(comfyui.process.pid).values()


@pytest.fixture
def patient(request):
    if not request.config.getoption("--all-silences"):
        pytest.skip("waits for a minute, the deadline of ranks in ComfyUI; --all-silences")


def test_a_hung_rank_does_not_stop_comfyuis_queue(patient, comfyui):
    """Unload Models asks a rank that hangs, in ComfyUI's only worker: other prompts run when its minute is over."""
    comfyui.wait(comfyui.queue(graphs.latent(seed=9)))
    rank, _ = ranks_of(comfyui.process.pid).values()
    os.kill(rank, signal.SIGSTOP)
    comfyui.post("/free", {"unload_models": True})
    began = time.monotonic()
    comfyui.wait(comfyui.queue(graphs.image_without_ranks()), timeout=100)
    assert time.monotonic() - began < CANCEL_DEADLINE + 10
    assert "Rank 0 did not answer in time" in comfyui.log and "Rank 0 is stopped by a signal" in comfyui.log
    comfyui.wait(comfyui.queue(graphs.latent(seed=10)))


def test_a_rank_that_hangs_in_a_cancelled_job_is_named_in_the_log_and_on_the_node(patient, comfyui):
    with Listener(comfyui) as listener:
        run = listener.queue(graphs.heavy_latent(seed=11, steps=1000))
        run.wait_for_step(graphs.SAMPLER, 2)
        os.kill(ranks_of(comfyui.process.pid)[1], signal.SIGSTOP)
        comfyui.post("/interrupt")
        assert run.end(timeout=CANCEL_DEADLINE + 15).kind == "execution_interrupted"
        texts = [event.data["text"] for event in listener.events if event.kind == "text"]
        said = "Ranks 0, 1 did not answer in time, so the group was ended."
        assert any(said in text and "Rank 1 is stopped by a signal" in text for text in texts), texts
        assert said in comfyui.log
        listener.run(graphs.latent(seed=12))
