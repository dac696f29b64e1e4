"""What the pack adds to ComfyUI's start."""

import re

from comfy_server import PACK_NAME, ComfyServer

STARTS = 3


def test_the_pack_adds_less_than_half_a_second(comfyui):
    """By ComfyUI's own clock of custom nodes; the best of three, as other programs take their share of the machine."""
    logs = [comfyui.log]
    for _ in range(STARTS - 1):
        with ComfyServer() as server:
            logs.append(server.log)
    seconds = [import_seconds(log) for log in logs]
    print(f"ComfyUI imported the pack in {', '.join(f'{s:.1f}' for s in seconds)} s")
    assert min(seconds) < 0.5


def import_seconds(log: str) -> float:
    found = re.search(rf"([\d.]+) seconds(.*): \S*{PACK_NAME}$", log, re.MULTILINE)
    assert found, f"no import time of the pack in the log:\n{log}"
    assert "IMPORT FAILED" not in found[2]
    return float(found[1])
