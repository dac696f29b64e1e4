"""The machine in a report: its cards, versions and memory. No names of hosts and users, and no folders of theirs.

A command of `benchmarks.ascend`, because it starts a driver: python -m benchmarks.ascend.machine KIND
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Mapping

import psutil
import torch
from ascend_runtime.hardware import cores, devices, host, memory
from ascend_runtime.hardware.environment import NPU, ORIGINAL_VARIABLES, rank_environment
from ascend_runtime.ops import libraries
from msgspec import Struct

from ..report import version

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path("/usr/local/Ascend/driver/version.info")
PACKAGES = ("torch", "torch_npu", "mindiesd", "diffusers", "transformers")
CPU = Path("/proc/cpuinfo")
# Folders that are the same on every machine. Others may be a user's.
SYSTEM = ("usr", "lib", "lib64", "dev", "proc", "sys", "etc", "opt")
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;()]+/)+(?=[^\s/'\":,;()])")


class Cards(Struct, frozen=True, kw_only=True):
    """The cards that ranks can use. line: an NPU's product line (see `devices.card`)."""

    kind: str
    count: int
    name: str = ""
    line: str | None = None
    gibibytes: float = 0.0  # of memory, of each card
    cann: str = ""
    problem: str = ""  # why the rest is not known

    def __str__(self) -> str:
        if self.kind == "cpu":
            return "none"
        known = f"{self.name}, {self.gibibytes:.0f} GiB each" if self.name else f"not known: {scrub(self.problem)}"
        return f"{self.count} x {known}" + (f" ({self.line.upper()})" if self.line else "")


def find_cards(kind: str, count: int) -> Cards:
    """Asks the first card, in a process with the ranks' environment, which ends and leaves the card empty."""
    if kind == "cpu":
        return Cards(kind=kind, count=0)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ascend.machine", kind], cwd=ROOT,
            env=rank_environment(kind, os.environ, {}), capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return Cards(kind=kind, count=count, **json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        return Cards(kind=kind, count=count, problem=(error.stderr.strip().splitlines() or [str(error)])[-1])
    except (subprocess.TimeoutExpired, ValueError) as error:
        return Cards(kind=kind, count=count, problem=str(error))


def describe(cards: Cards, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a report says of this machine, by name."""
    known = {row.name for row in (*NPU, *ORIGINAL_VARIABLES)} | {cores.THREADS_VARIABLE}
    chosen = sorted(name for name in known if environ.get(name))
    return {
        "cards": str(cards),
        "NPUs": scrub(" ".join(host.problems(environ))) if cards.kind != "npu" and version("torch_npu") else "",
        "driver": _driver(cards.kind),
        "CANN": cards.cann,
        **{name: version(name) or "" for name in PACKAGES},
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{_processor()}, {cores.usable_cores()} cores, bfloat16 instructions: "
        f"{'yes' if cores.compute_bfloat16() else 'no'}",
        "host memory": f"{_gib(psutil.virtual_memory().total)}, {_gib(memory.available())} available",
        "pack": _commit(),
        "variables": scrub(", ".join(f"{name}={environ[name]}" for name in chosen)),
    }


def _gib(count: int) -> str:
    return f"{count / 2**30:.0f} GiB"


def scrub(text: str) -> str:
    """`text` without the host's name, addresses and folders that may be a user's; of a path, the last name stays."""
    text = text.replace(str(Path.home()), "~")
    text = FOLDERS.sub(lambda found: found[0] if found[0].split("/")[1] in SYSTEM else ".../", text)
    text = ADDRESS.sub("ADDRESS", text)
    name = platform.node()
    return re.sub(rf"\b{re.escape(name)}\b", "HOST", text) if name else text


def _driver(kind: str) -> str:
    if kind == "cuda":
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    try:
        found = re.search(r"^Version=(.+)$", DRIVER.read_text(), re.MULTILINE)
    except OSError:
        found = re.search(r"Version:\s*(\S+)", _output("npu-smi", "info")) if kind == "npu" else None
    return found[1].strip() if found else ""


def _processor() -> str:
    """The processor's name, or on Arm the numbers of its maker and part (a Kunpeng 920 is 0x48, 0xd01)."""
    text = CPU.read_text()
    if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return found[1]
    numbers = [re.search(rf"^CPU {what}\s*:\s*(\S+)$", text, re.MULTILINE) for what in ("implementer", "part")]
    return ", ".join(f"CPU {what} {number[1]}" for what, number in zip(("implementer", "part"), numbers) if number)


def _commit() -> str:
    """The pack's commit, and whether files differ from it."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    return commit and commit + (" with changes" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _output(*command: str) -> str:
    """What the command prints; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cann_version() -> str:
    """The version of CANN, as torch_npu finds it."""
    return import_module("torch_npu.utils.collect_env").get_cann_version()


def main() -> None:
    kind = sys.argv[1]
    if kind == "npu":
        libraries.torch_npu()
    device = devices.take(kind, 0)
    module = getattr(torch, kind)
    found = {"name": module.get_device_name(device), "line": devices.card(device),
             "gibibytes": module.get_device_properties(device).total_memory / 2**30}  # fmt: skip
    if kind == "npu":
        found["cann"] = cann_version()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
