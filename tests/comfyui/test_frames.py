"""Frames in the real ComfyUI: an IMAGE is the memory that the ranks wrote, for as long as someone looks at it."""

import os
import signal
from pathlib import Path

import comfy_graphs as graphs
import torch
from benchmarks.memory import highest_rss, rss
from diffusers import AutoencoderKLWan
from rank_processes import holders, mapped_at, ranks_of, seconds_until, shared_memory
from safetensors.torch import load_file
from torch.testing import assert_close

WIDTH, HEIGHT, LENGTH = 256, 192, 17
NBYTES = WIDTH * HEIGHT * LENGTH * 3 * 4
HOLD, LET_GO = "hold", "let go"  # nodes


def decoded(width: int = WIDTH, height: int = HEIGHT, length: int = LENGTH) -> dict:
    """A latent of zeros, decoded by two ranks, whose frames are kept beyond the prompt."""
    graph = {node: content for node, content in graphs.video().items()
             if node in (graphs.PARALLEL, graphs.VAE, graphs.EMPTY, graphs.DECODE)}  # fmt: skip
    graph[graphs.EMPTY]["inputs"].update(width=width, height=height, seconds=(length - 1) / 16)
    graph[graphs.DECODE]["inputs"]["samples"] = [graphs.EMPTY, 0]
    graph[HOLD] = {"class_type": "TestHold", "inputs": {"images": [graphs.DECODE, 0]}}
    return graph


def let_go(seed: int) -> dict:
    return {LET_GO: {"class_type": "TestLetGo", "inputs": {"seed": seed}}}


def there_and_back(seed: int, size: int) -> dict:
    """Five frames, encoded and decoded by two ranks, and saved."""
    graph = {node: content for node, content in decoded().items() if node in (graphs.PARALLEL, graphs.VAE)}
    vae, pixels = [graphs.VAE, 0], {"seed": seed, "frames": 5, "width": size, "height": size}
    return graph | {
        "video": {"class_type": "TestRandomImage", "inputs": pixels},
        "encode": {"class_type": "AscendVAEEncode", "inputs": {"pixels": ["video", 0], "vae": vae}},
        graphs.DECODE: {"class_type": "AscendVAEDecode", "inputs": {"samples": ["encode", 0], "vae": vae}},
        graphs.SAVE: {"class_type": "TestSave", "inputs": {"images": [graphs.DECODE, 0]}},
    }


def test_an_image_is_the_ranks_memory_until_nobody_looks(comfyui, checkpoint):
    """Decoding makes and reads no page of it in ComfyUI's process; it outlives the ranks, and not its last view."""
    pid = comfyui.process.pid
    for seed, size in ((1, (64, 64, 5)), (2, (64, 64, 9))):  # loads, and fills what libraries keep
        comfyui.wait(comfyui.queue(decoded(*size)))
        comfyui.wait(comfyui.queue(let_go(seed)))
    before = rss(pid)
    with highest_rss([pid]) as highest:
        entry = comfyui.wait(comfyui.queue(decoded()))
    print(f"frames of {NBYTES / 1e6:.1f} MB, and ComfyUI's process grew by {(highest[pid] - before) / 1e6:.1f} MB")
    assert highest[pid] - before < NBYTES / 2
    name, inode = mapped_at(pid, entry["outputs"][HOLD]["address"][0])
    assert name.startswith("/memfd:ascend-frames")

    ranks = ranks_of(pid)
    for rank in ranks.values():
        os.kill(rank, signal.SIGKILL)
    seconds_until(lambda: not ranks_of(pid), timeout=10)
    comfyui.post("/free", {"unload_models": True, "free_memory": True})
    seconds_until(lambda: holders({inode}) == {pid}, timeout=10)
    file = graphs.saved(comfyui, comfyui.queue(let_go(3)), LET_GO)
    seconds_until(lambda: not holders({inode}), timeout=10)
    vae = AutoencoderKLWan.from_pretrained(str(checkpoint / "vae"))
    with torch.no_grad():
        expected = vae.decode(torch.zeros(1, 16, (LENGTH + 3) // 4, HEIGHT // 8, WIDTH // 8)).sample[0] / 2 + 0.5
    assert_close(load_file(file)["images"], expected.movedim(0, -1)[1:], atol=1e-4, rtol=0.0)


def test_thirty_jobs_leave_nothing(comfyui):
    pid, size = comfyui.process.pid, 128
    frames, resident, files, open_files = 5 * size * size * 3 * 4, [], [], []
    named = shared_by_name(pid)
    for seed in range(30):
        comfyui.wait(comfyui.queue(there_and_back(seed, size)))
        everyone = [pid, *ranks_of(pid).values()]
        assert len(everyone) == 3
        resident.append([rss(each) for each in everyone])
        files.append(len(shared_memory(everyone)))
        open_files.append(sum(len(os.listdir(f"/proc/{each}/fd")) for each in everyone))
    growth = [(last - tenth) / 20 for tenth, last in zip(resident[9], resident[-1])]
    print(", ".join(f"{each / 1e3:+.0f} kB" for each in growth) + f" a job, of frames of {frames / 1e3:.0f} kB")
    assert max(growth) < frames / 4
    # Not one a job; but a rank may hold one yet when the next job begins, which then takes another.
    assert max(files[10:]) <= max(files[:10]) + 2, files
    assert max(open_files[10:]) <= max(open_files[:10]) + 2 * len(everyone), open_files
    assert set().union(*map(shared_by_name, everyone)) <= named  # what libraries of ComfyUI's had before


def shared_by_name(pid) -> set[str]:
    """The files of /dev/shm that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "/dev/shm/" in line}
