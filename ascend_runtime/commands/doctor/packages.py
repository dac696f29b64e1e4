"""Checks of Python and of the packages that the pack needs, by their metadata, and by importing them in a process."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

from ...hardware import host
from ...hardware.host import HostFault
from ...hardware.versions import installed
from .findings import Finding, errors_or, warning
from .surroundings import MOST_OUTPUT, Surroundings

_PYTHONS = ((3, 10), (3, 12))  # first and last, as in pyproject.toml
_TORCHES = ("2.7", "2.9", "2.10", "2.11", "2.12", "2.13")
_MODULES = {"pillow": "PIL", "websocket-client": "websocket"}  # where a package's module has another name
# diffusers imports torch as well; both take seconds, so each group is imported by a process of its own, side by side.
_SLOW = ("torch", "diffusers")
_IMPORT_SECONDS = 20
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)((?:[<>=]=?[0-9.]+,?)*)")
_PROBE = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:500]
print(json.dumps(found))
"""


def _python(around: Surroundings) -> Iterator[Finding]:
    here = ".".join(map(str, around.version))
    first, last = (".".join(map(str, version)) for version in _PYTHONS)
    faults = [] if _PYTHONS[0] <= around.version <= _PYTHONS[1] else [
        HostFault("AV-1014", f"This Python is {here}; the pack runs on {first} to {last}.",
                  f"Run ComfyUI with a Python from {first} to {last}.")]  # fmt: skip
    yield from errors_or("Python", faults, f"{here}, {around.python}")


def _requirements(around: Surroundings) -> Iterator[Finding]:
    """Whether torch and all of requirements.txt are installed, with versions that are supported."""
    torch, required = installed("torch"), _required(around)
    faults = []
    if torch is None:
        faults.append(HostFault("AV-1015", "torch is not installed in this Python.",
                                "Use the Python that runs ComfyUI, or install torch first."))  # fmt: skip
    elif ".".join(torch.split(".")[:2]) not in _TORCHES:
        yield warning("packages", HostFault(
            "AV-1015", f"torch is {torch}; the pack is checked with {', '.join(_TORCHES)}.",
            "If jobs fail, install one of these, with what belongs to it (torchvision, torch_npu).",
        ))  # fmt: skip
    if missing := [name for name, _ in required if installed(name) is None]:
        faults.append(HostFault("AV-1015", f"Not installed: {', '.join(missing)}.",
                                f"{around.python} -m pip install -r {around.pack / 'requirements.txt'}"))  # fmt: skip
    for name, bounds in required:
        version = installed(name)
        if version is not None and not _within(version, bounds):
            faults.append(HostFault("AV-1015", f"{name} is {version}; the pack needs {name}{bounds}.",
                                    f'{around.python} -m pip install "{name}{bounds}"'))  # fmt: skip
    named = ", ".join(f"{name} {installed(name)}" for name in ("torch", "diffusers", "transformers"))
    yield from errors_or("packages", faults, f"{named}, and all others of requirements.txt")


def _required(around: Surroundings) -> list[tuple[str, str]]:
    """(package, its bounds) for each line of requirements.txt."""
    try:
        lines = (around.pack / "requirements.txt").read_text().splitlines()
    except OSError:
        return []
    found = [_REQUIREMENT.match(line.partition("#")[0].strip()) for line in lines]
    return [(one[1], one[2]) for one in found if one]


def _within(version: str, bounds: str) -> bool:
    own = _numbers(version)
    checks = {">=": lambda other: own >= other, "<": lambda other: own < other, "==": lambda other: own == other}
    return all(checks[sign](_numbers(other)) for sign, other in re.findall(r"([<>=]+)([0-9.]+)", bounds))


def _numbers(version: str) -> tuple[int, ...]:
    """A release's numbers, with as many zeros as make versions of different lengths comparable."""
    release = re.match(r"[0-9.]*", version)[0]
    numbers = [int(number) for number in release.split(".") if number]
    return tuple((numbers + [0] * 4)[:4])


class Imports:
    """Imports packages in processes that run while other checks do. A package that crashes ends only its process."""

    def __init__(self, around: Surroundings):
        self._around = around
        names = [name for name, _ in [("torch", ""), *_required(around)] if installed(name)]
        groups = ([name for name in names if name in _SLOW], [name for name in names if name not in _SLOW])
        self._running = [(group, self._start(group)) for group in groups if group]

    def _start(self, names: list[str]) -> subprocess.Popen:
        command = [self._around.python, "-c", _PROBE, *(_MODULES.get(name, name) for name in names)]
        return subprocess.Popen(command, env=dict(self._around.environ), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")  # fmt: skip

    def findings(self, around: Surroundings) -> Iterator[Finding]:
        deadline, late, faults = around.clock() + _IMPORT_SECONDS, [], []
        for names, process in self._running:
            try:
                output, _ = process.communicate(timeout=max(0.1, deadline - around.clock()))
                faults += self._faults(names, output, process.returncode)
            except subprocess.TimeoutExpired:
                process.kill()  # and no wait for its end, as a process that a driver blocks does not end
                late += names
        if late:
            yield warning("imports", HostFault(
                "AV-1016", f"Importing {' and '.join(late)} takes more than {_IMPORT_SECONDS} s, so it was not waited "
                "for.", "Move this Python to a faster disk. The first import after a boot is slow, so try again.",
            ))  # fmt: skip
        if faults or not late:
            yield from errors_or("imports", faults, "every installed package can be imported")

    def _faults(self, names: list[str], output: bytes, status: int) -> Iterator[HostFault]:
        try:
            broken = {str(name): str(why) for name, why in json.loads(output[:MOST_OUTPUT].splitlines()[-1]).items()}
        except (ValueError, AttributeError, IndexError):
            broken = {", ".join(names): f"the process ended with status {status}"}
        for name, why in broken.items():
            yield HostFault("AV-1016", f"{name} cannot be imported ({why}).", self._cure(why))

    def _cure(self, why: str) -> str:
        if re.search(r"lib(hccl|ascendcl|ascend_hal)", why):
            return f"{host.SET_ENV}."
        requirements = self._around.pack / "requirements.txt"
        return f"{self._around.python} -m pip install --force-reinstall --no-deps PACKAGE, or -r {requirements}."


PACKAGE_CHECKS = (_python, _requirements)
