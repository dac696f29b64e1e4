"""kill -9, of a rank under ComfyUI and of ComfyUI over its ranks: said at once, nothing left, mended by itself."""

import os
import signal
import time

import comfy_graphs as graphs
import torch
from comfy_listener import Listener
from scripts.lib.comfy_server import ComfyServer
from rank_processes import holders, ranks_of, seconds_until, shared_memory

LONG = {"steps": 1000, "length": 17}


def test_a_killed_rank_is_named_and_the_next_job_is_right(comfyui):
    with Listener(comfyui) as listener:
        graph = graphs.latent(seed=1)
        expected = graphs.saved_latent(comfyui, listener.run(graph).prompt_id)
        run = listener.queue(graphs.heavy_latent(seed=2, **LONG))
        run.wait_for_step(graphs.SAMPLER, 2)
        before = ranks_of(comfyui.process.pid)
        memory = shared_memory(before.values())
        killed = time.monotonic()
        os.kill(before[1], signal.SIGKILL)
        ending = run.end()
        print(f"the error came {ending.at - killed:.2f} s after the kill")
        assert ending.kind == "execution_error" and ending.at - killed <= 2
        message = ending.data["exception_message"]
        assert "AV-1501: Rank 1 of 2 was killed by SIGKILL" in message and message.count("docs/errors.md") == 1
        seconds_until(lambda: not ranks_of(comfyui.process.pid), timeout=3)
        again = listener.run(graph)
        assert graphs.SAMPLER not in again.cached()
        assert torch.equal(graphs.saved_latent(comfyui, again.prompt_id), expected)
        after = ranks_of(comfyui.process.pid)
        assert len(after) == 2 and not set(after.values()) & set(before.values())
        assert memory and not holders(memory)


def test_a_killed_comfyui_leaves_nothing(tmp_path, checkpoint):
    folders = tmp_path / "models" / "diffusers"
    folders.mkdir(parents=True)
    (folders / graphs.RANDOM).symlink_to(checkpoint)
    with ComfyServer(base=tmp_path) as server, Listener(server) as listener:
        run = listener.queue(graphs.latent(seed=1, **LONG))
        run.wait_for_step(graphs.SAMPLER, 2)
        comfyui = server.process.pid
        ranks = ranks_of(comfyui)
        memory = shared_memory(ranks.values())
        assert len(ranks) == 2 and memory
        server.process.kill()
        left = seconds_until(lambda: not ranks_of(comfyui) and not holders(memory), timeout=3)
        print(f"2 ranks and {len(memory)} shared memory file(s) were gone {left:.2f} s after ComfyUI was killed")
