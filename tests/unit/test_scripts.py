"""The scripts' own arguments, where they answer before anything is installed."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("script", ["test.sh", "demo.sh"])
def test_a_folder_without_a_comfyui_is_refused(tmp_path, script):
    """Named as seen from where the script is called; nothing is made or installed before."""
    (tmp_path / "mine").mkdir()
    command = ["bash", str(SCRIPTS / script), "--comfyui", "mine"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0 and ran.stdout == ""
    assert f"error: {tmp_path / 'mine'} holds no ComfyUI: there is no main.py in it" in ran.stderr


def test_the_option_needs_a_folder(tmp_path):
    command = ["bash", str(SCRIPTS / "test.sh"), "--comfyui"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0 and "--comfyui takes the folder of a ComfyUI" in ran.stderr
