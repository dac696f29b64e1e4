"""Writes what a version of the pack makes of the saved workflows: jobs.json, latents.safetensors and weights.json.

    git worktree add --detach PACK 5cb33f3
    .venv/bin/python tests/comfyui/saved_workflows/make_reference.py PACK

PACK is run by this repository's ComfyUI with this repository's test nodes and random models.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # as tests/conftest.py has it

FOLDER = Path(__file__).resolve().parent
TESTS = FOLDER.parents[1]
sys.path[:0] = map(str, (TESTS.parent, TESTS, *(path for path in TESTS.iterdir() if path.is_dir()),
                         TESTS.parent, TESTS.parent / "scripts"))  # fmt: skip

import test_saved_workflows as saved
from scripts.lib.comfy_server import ComfyServer
from safetensors.torch import save_file


def main(pack: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("custom_nodes", "input", "models"):
            (base / name).mkdir()
        (base / "custom_nodes" / "test_nodes").symlink_to(TESTS / "comfy_nodes")
        saved.write_inputs(base)
        write("weights.json", saved.weights(base))
        with ComfyServer(pack=pack, base=base) as server:
            write("jobs.json", {name: saved.jobs_of(server, name) for name in saved.NAMES})
            latents = {name: saved.latent_of(server, name) for name in saved.NAMES}
    save_file(latents, FOLDER / "latents.safetensors")


def write(name: str, values: dict) -> None:
    """JSON with a line for each job."""
    lines = ",\n".join(f" {json.dumps(key)}: {in_lines(value)}" for key, value in values.items())
    (FOLDER / name).write_text(f"{{\n{lines}\n}}\n")


def in_lines(value) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    lines = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in value)
    return f"[\n{lines}\n ]"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
