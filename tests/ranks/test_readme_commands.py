"""The commands of README and docs/, as they stand there, on the embedded model: each speaks at once, goes on doing so,
and ends well.

In CI one of them, whose end counts in processor time, as the machine does other work as well, and the Python example on
ranks that are there; --all-commands runs each in a process of its own, by the clock.
"""

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import random_hunyuan
import random_wan
import tiny_llava
from ascend_runtime.client import runtime as client

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIRST_WORD, GAP, END = 3.0, 10.0, 60.0  # seconds
LATE = 5.0  # seconds that a line may be late where the machine is busy
RUN_ELSEWHERE = {
    "queue": "tests/unit/test_queue.py, on a real ComfyUI,", "adopt": "tests/unit/test_adoption.py",
    "explain": "tests/comfyui/test_explained_videos.py", "download": "tests/files/test_downloads.py, on a local hub,",
    "cluster": "tests/unit/test_clusters.py",
}  # fmt: skip
SAMPLE = ("compare",)  # test_inspection.py runs `inspect` in CI as well
# What the documents name and nobody has here: copies of the embedded model, a random model, and a file of the
# original's form.
FOLDERS = ("models/diffusers/Wan2.2-T2V-A14B",)
HUNYUAN = "models/diffusers/HunyuanVideo"
SMALL = {"width": 64, "height": 48, "num_frames": 9, "steps": 8}  # the random model's own settings
FILES = ("wan2.1_t2v_14B_fp8_scaled.safetensors",)


def commands() -> list[str]:
    blocks = "\n".join(BASH.findall(DOCUMENTS)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("python -m ascend_runtime ")]


def name_of(command: str) -> str:
    return command.split()[3]


def test_the_documents_show_every_command():
    shown = {name_of(command) for command in commands()}
    assert shown == {"inspect", "convert", "calibrate", "compare", "explain", "queue", "adopt", "plan", "doctor",
                     "download", "cluster"}  # fmt: skip
    named = ("assets/tiny_wan", HUNYUAN, *FOLDERS, *FILES)
    assert [name for name in named if name not in "\n".join(commands())] == []


@pytest.fixture
def clone(tmp_path):
    """What a clone of the pack has that commands read, and what they may write to."""
    for folder in ("assets/tiny_wan", *FOLDERS):
        shutil.copytree(ROOT / "assets" / "tiny_wan", tmp_path / folder)
    for file in FILES:
        random_wan.original_transformer(tmp_path / file)
    hunyuan = tiny_llava.save(random_hunyuan.folder(tmp_path / HUNYUAN))
    (hunyuan / "ascend_defaults.json").write_text(json.dumps(SMALL))
    return tmp_path


def run(arguments: list[str], folder: Path) -> tuple[int, str, list[float]]:
    """Exit status, what was printed, and the seconds from the start to each line and to the end."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began, lines, times = time.monotonic(), [], []
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    timer = threading.Timer(2 * END + 60, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            times.append(time.monotonic() - began)
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    return status, "".join(lines), [*times, time.monotonic() - began]


def processor_seconds() -> float:
    """Of this process's children and theirs, as far as they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", commands())
def test_a_command_speaks_at_once_and_goes_on_doing_so(command, clone, request):
    name = name_of(command)
    if name in RUN_ELSEWHERE:
        pytest.skip(f"{RUN_ELSEWHERE[name]} runs it")
    sampled = name in SAMPLE and "assets/tiny_wan" in command
    if not sampled and not request.config.getoption("--all-commands"):
        pytest.skip("--all-commands runs it")
    before = processor_seconds()
    status, printed, times = run(shlex.split(command, comments=True)[1:], clone)
    worked = processor_seconds() - before
    print(f"first line after {times[0]:.2f} s, end after {times[-1]:.1f} s ({worked:.1f} s of a processor): {command}")
    print(printed)
    assert status == 0, printed
    assert times[0] < FIRST_WORD
    assert (times[-1] if request.config.getoption("--all-commands") else worked) < END
    assert max(later - earlier for earlier, later in zip(times, times[1:])) < GAP + LATE


def example(part: str = "with Runtime") -> str:
    (found,) = [block for block in PYTHON.findall(DOCUMENTS) if part in block]
    return found


def assert_made(printed: str) -> None:
    assert "denoise 20 20" in printed and "torch.Size([17, 64, 64, 3])" in printed, printed


def test_the_python_example_makes_the_models_own_video(two_ranks, monkeypatch, capsys):
    monkeypatch.setattr(client, "Runtime", lambda *_: nullcontext(two_ranks))
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(example(), "docs/python.md", "exec"), names)
    assert_made(capsys.readouterr().out)
    exec(compile(example("NetworkPass"), "docs/python.md", "exec"), names)
    assert 0.5 < names["x"].std() < 2


def test_the_python_example_in_a_process_of_its_own(clone, request):
    if not request.config.getoption("--all-commands"):
        pytest.skip("--all-commands runs it")
    status, printed, times = run(["-c", example()], clone)
    assert status == 0 and times[-1] < END, printed
    assert_made(printed)
