"""The pack as others install it: the registry's check and package, comfy-cli from a git address, and pip."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from comfy_graphs import saved
from scripts.lib.comfy_server import COMFYUI, ComfyServer
from scripts.lib.environment import Environment, inspect

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "workflows" / "api" / "tiny_wan_text_to_video.json"
MANAGER = "comfyui-manager==4.3"  # brings cm-cli, which `comfy node install` calls
# What the registry's package has at its top: what runs, what explains it, and what an installation reads.
SHIPPED = {"__init__.py", "ascend_runtime", "nodes", "web", "locales", "workflows", "assets", "docs", "README.md",
           "CHANGELOG.md", "LICENSE", "pyproject.toml", "requirements.txt"}  # fmt: skip
MAY_SHIP = {"subgraphs", "example_workflows"}


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """A git repository of the files that this one has now, committed or not."""
    target = tmp_path_factory.mktemp("address") / "ascend-video"
    target.mkdir()
    names = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    git(target, "init", "-q")
    git(target, "add", "-A")
    git(target, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "as it is")
    return target


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def comfy(folder: Path, *arguments: str, python: Path | str = sys.executable, **environment: str) -> str:
    """What comfy-cli prints, run in a folder, with a home of its own. Fails unless it ends well."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [str(python), "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *arguments], cwd=folder, text=True,
        env={**os.environ, "HOME": str(home), "COLUMNS": "200", **environment}, capture_output=True, timeout=300,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def packed(repository) -> zipfile.ZipFile:
    comfy(repository, "node", "pack")
    with zipfile.ZipFile(repository / "node.zip") as package:
        yield package


def test_the_registry_has_nothing_to_warn_of(repository, tmp_path, packed):
    """The registry checks what is packed: eval, exec, subprocesses of a shell, several statements in a line."""
    shutil.copytree(repository, tmp_path / "pack", ignore=shutil.ignore_patterns("tests", ".git", "node.zip"))
    said = comfy(tmp_path / "pack", "node", "validate")
    assert "All validation checks passed" in said and "Warning" not in said


def test_the_package_has_what_runs_and_nothing_else(packed):
    names = packed.namelist()
    top = {name.split("/")[0] for name in names}
    assert SHIPPED <= top <= SHIPPED | MAY_SHIP
    assert not [name for name in names if name.endswith((".pyc", ".zip")) or "/." in name]
    assert sum(packed.getinfo(name).compress_size for name in names) < 16e6


def test_the_changes_begin_with_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert first == version and re.fullmatch(r"\d+\.\d+\.\d+", version)


@pytest.fixture(scope="session")
def installed(repository, tmp_path_factory) -> Path:
    """A folder into which pip has installed the runtime, as into site-packages."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-compile",
               "--disable-pip-version-check", "--target"]  # fmt: skip
    subprocess.run([*command, str(target), str(repository)], check=True, timeout=120)
    return target


def run_installed(installed: Path, folder: Path, *command: str) -> str:
    environment = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_runs_in_any_folder(installed, tmp_path):
    said = run_installed(installed, tmp_path, str(installed / "bin" / "ascend-video"), "--help")
    assert said.startswith("usage: ascend-video [-h] COMMAND")


VIDEO = """
import ascend_runtime
from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, TextEncoderSpec, VaeSpec
import torch
with Runtime(ParallelSpec(ranks=1), device="cpu") as runtime:
    frames = runtime.decode(VaeSpec(path=PATH), torch.zeros(1, 16, 1, 8, 8)).tensor
print(ascend_runtime.__file__, list(frames.shape))
"""


def test_ranks_run_from_an_installed_copy(installed, tmp_path, request):
    if not request.config.getoption("--comfy-cli"):
        pytest.skip("--comfy-cli runs it")
    said = run_installed(installed, tmp_path, sys.executable, "-c",
                         VIDEO.replace("PATH", repr(str(ROOT / "assets" / "tiny_wan"))))  # fmt: skip
    assert said.split() == [str(installed / "ascend_runtime" / "__init__.py"), "[1,", "64,", "64,", "3]"]


def test_nothing_that_pip_installs_with_it_asks_for_torch():
    """An NPU host's torch must stay: no requirement, nor what that one requires, may name another."""
    waiting = [re.split(r"[^\w.-]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
               if line and not line.startswith("#")]  # fmt: skip
    seen = set()
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # of another system or Python
        waiting += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    assert {"diffusers", "transformers", "huggingface-hub", "numpy"} <= seen and "torch" not in seen


@pytest.fixture
def comfy_cli(tmp_path, request) -> Path:
    """The Python of an environment with comfy-cli and ComfyUI-Manager, over that of the tests."""
    if not request.config.getoption("--comfy-cli"):
        pytest.skip("--comfy-cli runs it")
    environment = Environment(tmp_path / "environment", inspect(sys.executable))
    environment.make(base=sys.executable)
    environment.install("ComfyUI-Manager", [MANAGER])
    return environment.python


def test_comfy_cli_installs_it_from_a_git_address(repository, comfy_cli, tmp_path):
    """Into a fresh ComfyUI, which then makes a video with it."""
    workspace = tmp_path / "ComfyUI"
    shutil.copytree(COMFYUI, workspace, ignore=shutil.ignore_patterns("custom_nodes", "models", "__pycache__"))
    (workspace / "custom_nodes").mkdir()
    git(workspace, "init", "-q")
    comfy(workspace, "--workspace", str(workspace), "node", "install", "--exit-on-fail",
          f"file://localhost{repository}", python=comfy_cli, COMFYUI_PATH=str(workspace))  # fmt: skip
    pack = workspace / "custom_nodes" / "ascend-video"
    assert (pack / "nodes" / "sampler.py").is_file()
    assert_makes_a_video(pack)


def test_the_unpacked_package_makes_a_video(packed, installed, request, tmp_path):
    """Also where pip has installed another copy, which nothing of it may use."""
    if not request.config.getoption("--comfy-cli"):
        pytest.skip("--comfy-cli runs it")
    packed.extractall(tmp_path / "pack")
    other = shutil.copytree(installed, tmp_path / "other")
    for broken in (other / "ascend_runtime").rglob("__init__.py"):
        broken.write_text("raise SystemExit('the other copy')")
    assert_makes_a_video(tmp_path / "pack", PYTHONPATH=str(other))


def assert_makes_a_video(pack: Path, **environment: str) -> None:
    prompt = json.loads(TINY.read_text())
    with ComfyServer(pack=pack, env=environment) as server:
        prompt_id = server.queue(prompt)
        server.wait(prompt_id, timeout=120)
        assert saved(server, prompt_id).stat().st_size > 1000
        assert "ascend" in server.log
