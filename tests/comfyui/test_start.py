"""What the pack adds to ComfyUI's start."""

import re

from scripts.lib.comfy_server import PACK_NAME, ComfyServer

BAR = 0.5  # seconds
STARTS = 3


def test_the_pack_adds_less_than_half_a_second(comfyui):
    """By ComfyUI's own clock of custom nodes; up to two more starts where other programs took their share of one."""
    seconds = [import_seconds(comfyui.log)]
    while min(seconds) >= BAR and len(seconds) < STARTS:
        with ComfyServer() as server:
            seconds.append(import_seconds(server.log))
    print(f"ComfyUI imported the pack in {', '.join(f'{s:.1f}' for s in seconds)} s")
    assert min(seconds) < BAR


def import_seconds(log: str) -> float:
    found = re.search(rf"([\d.]+) seconds(.*): \S*{PACK_NAME}$", log, re.MULTILINE)
    assert found, f"no import time of the pack in the log:\n{log}"
    assert "IMPORT FAILED" not in found[2]
    return float(found[1])
