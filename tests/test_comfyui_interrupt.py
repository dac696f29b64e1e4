"""ComfyUI's Cancel button: the ranks stop within a step, and stay."""

import time

import comfy_graphs as graphs
import pytest
import torch
from comfy_listener import Listener
from comfy_server import PromptFailed
from rank_processes import ranks_of

INTERRUPTS = 3
ASKED = 0.1  # seconds beside one step
WAY = 0.15  # seconds for the poll of the running job (0.05), and for the websocket


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupt_ends_the_job_within_a_step(comfyui, ranks):
    with Listener(comfyui) as listener:
        graph = graphs.heavy_latent(seed=1, ranks=ranks)
        expected = graphs.saved_latent(comfyui, listener.run(graph).prompt_id)
        before = ranks_of(comfyui.process.pid)
        excess = [interrupt(comfyui, listener, seed=100 + i, ranks=ranks) for i in range(INTERRUPTS)]
        print(f"{ranks} rank(s): ended {', '.join(f'{s:.3f}' for s in excess)} s later than a step after the request")
        assert sorted(excess)[INTERRUPTS // 2] <= ASKED + WAY  # the median, as the machine may be busy
        assert ranks_of(comfyui.process.pid) == before and len(before) == ranks
        after = listener.run(graph)
        assert graphs.SAMPLER not in after.cached()
        assert torch.equal(graphs.saved_latent(comfyui, after.prompt_id), expected)


def interrupt(comfyui, listener, seed: int, ranks: int) -> float:
    """Interrupts a job of a thousand steps in its fifth; the seconds it went on beyond the longest of its steps."""
    run = listener.queue(graphs.heavy_latent(seed=seed, ranks=ranks, steps=1000, length=17))
    run.wait_for_step(graphs.SAMPLER, 4)
    comfyui.post("/interrupt")
    asked = time.monotonic()
    ending = run.end()
    assert ending.kind == "execution_interrupted" and ending.data["node_id"] == graphs.SAMPLER
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(run.prompt_id)
    assert caught.value.kind == "execution_interrupted"
    times = {event.data["value"]: event.at for event in run.of("progress", graphs.SAMPLER) if event.data["max"] == 1000}
    return ending.at - asked - max(times[step + 1] - times[step] for step in sorted(times)[:-1])
