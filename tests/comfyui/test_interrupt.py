"""ComfyUI's Cancel button: the ranks stop within a step, and stay with their weights, whatever they were at.

The bar is one step and 0.1 s from the request on. What a client sees of it is later by what ComfyUI takes to tell it,
through an event loop that shares the machine with the ranks. The same run measures that: a request that asks ComfyUI
nothing but for an answer passes the same loop, and the longest of several is the slack. The step is the longest that
the run saw. Each interrupt is held to the bar, not their median, with --all-cancels, which wants a quiet machine; else
it is counted how many steps are told yet: few of a thousand.
"""

import random
import time

import comfy_graphs as graphs
import pytest
import torch
from benchmarks.opens import Opened
from comfy_listener import Listener
from scripts.lib.comfy_server import PromptFailed
from new_prompts import new_prompt
from rank_processes import ranks_of

INTERRUPTS = 3
STEPS = 1000
STEPS_AFTER = 3  # told after the request: one on its way, one that was done when it came, and one that had begun
BAR = 0.1  # seconds beside one step
ANSWERS = 10


@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupt_ends_the_job_within_a_step(request, comfyui, ranks):
    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")
    rng = random.Random(seed)
    with Listener(comfyui) as listener:
        graph = graphs.heavy_latent(seed=1, ranks=ranks)
        expected = graphs.saved_latent(comfyui, listener.run(graph).prompt_id)
        before = ranks_of(comfyui.process.pid)
        for i in range(INTERRUPTS):
            took, after, step, told = interrupt(comfyui, listener, rng, seed=100 + i, ranks=ranks)
            print(f"{ranks} rank(s): {took:.3f} s, {after} steps; longest {step:.3f} s, an answer {told:.3f} s")
            assert after <= STEPS_AFTER
            assert not request.config.getoption("--all-cancels") or took <= step + BAR + told
        assert ranks_of(comfyui.process.pid) == before and len(before) == ranks
        after = listener.run(graph)
        assert graphs.SAMPLER not in after.cached()
        assert torch.equal(graphs.saved_latent(comfyui, after.prompt_id), expected)


def interrupt(comfyui, listener, rng, seed: int, ranks: int) -> tuple[float, int, float, float]:
    """Interrupts a long job at some moment after its second step. Returns seconds from the request until ComfyUI said
    that the job was interrupted; steps told meanwhile; seconds of the longest step, and of ComfyUI's slowest answer."""
    run = listener.queue(graphs.heavy_latent(seed=seed, ranks=ranks, steps=STEPS, length=17))
    run.wait_for_step(graphs.SAMPLER, 2)
    told = max(seconds_of_an_answer(comfyui) for _ in range(ANSWERS))
    time.sleep(rng.uniform(0, longest_step(run)))
    asked = time.monotonic()
    comfyui.post("/interrupt")
    ending = run.end()
    assert ending.kind == "execution_interrupted" and ending.data["node_id"] == graphs.SAMPLER
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(run.prompt_id)
    assert caught.value.kind == "execution_interrupted"
    after = sum(at > asked for at in step_times(run).values())
    return ending.at - asked, after, longest_step(run), told


def longest_step(run) -> float:
    """Seconds of the longest step so far, the one that the interrupt came in too: its end is reported as that of any.
    Newer ComfyUIs leave reports out that follow one another closely."""
    times = sorted(step_times(run).items())
    return max((at - before) / (step - earlier) for (earlier, before), (step, at) in zip(times, times[1:]))


def step_times(run) -> dict[int, float]:
    """When each step was told."""
    events = run.of("progress", graphs.SAMPLER)
    return {event.data["value"]: event.at for event in events if event.data["max"] == STEPS}


def seconds_of_an_answer(comfyui) -> float:
    began = time.monotonic()
    comfyui.get("/prompt")
    return time.monotonic() - began


ENCODE_VIDEO = "encode video"  # a node
STAGES = {  # the node whose job it is, and whether that still reads files
    "load": (graphs.SAMPLER, True),
    "encode": (graphs.POSITIVE, False),
    "sample": (graphs.SAMPLER, False),
    "decode": (graphs.DECODE, False),
    "encode_video": (ENCODE_VIDEO, False),
}


@pytest.fixture(params=[False, True], ids=["as_it_is", "as_newer_ones"])
def interrupting(request, comfyui):
    """ComfyUI with its own InterruptProcessingException, and with newer ones' (see comfy_nodes/cancelling.py)."""
    comfyui.post("/tests/interrupts", {"newer": request.param})
    yield comfyui
    comfyui.post("/tests/interrupts", {"newer": False})


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancel_in_any_stage_keeps_ranks_and_weights(interrupting, checkpoint, stage):
    comfyui, (node, loading) = interrupting, STAGES[stage]
    with Listener(comfyui) as listener:
        listener.run(every_stage(seed=1))
        before = ranks_of(comfyui.process.pid)
        if loading:
            listener.run({"1": {"class_type": "AscendFreeMemory", "inputs": {"what": "weights"}}})
        comfyui.post("/tests/cancel", {"node": node, "loading": loading})
        ending = listener.queue(every_stage(seed=2)).end()
        assert (ending.kind, ending.data["node_id"]) == ("execution_interrupted", node)
        with Opened(checkpoint.rglob("*.safetensors")) as opened:
            run = listener.run(every_stage(seed=3))
        assert not {node for node, _ in STAGES.values()} & run.cached()
    assert ranks_of(comfyui.process.pid) == before and len(before) == 2
    # What is read when the cancel comes is dropped and what comes after it not read yet; the text encoder was read.
    assert {file.parent.name for file in opened.files()} <= ({"transformer", "vae"} if loading else set())


def every_stage(seed: int) -> dict:
    """A video of a prompt that no rank knows yet, and a latent of frames."""
    graph = graphs.video(seed=seed, length=5)
    graph[graphs.POSITIVE]["inputs"]["text"] = new_prompt()
    pixels = {"seed": seed, "frames": 5, "width": 64, "height": 64}
    graph["pixels"] = {"class_type": "TestRandomImage", "inputs": pixels}
    inputs = {"pixels": ["pixels", 0], "vae": [graphs.VAE, 0]}
    graph[ENCODE_VIDEO] = {"class_type": "AscendVAEEncode", "inputs": inputs}
    graph["save"] = graphs.save_latent([ENCODE_VIDEO, 0])
    return graph
