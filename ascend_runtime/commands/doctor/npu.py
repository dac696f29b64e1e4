"""Checks of the NPU driver, CANN, and the packages for NPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...hardware import host
from ...hardware.host import HostFault
from ...hardware.versions import installed
from .findings import Finding, errors_or, fine, warning
from .surroundings import Surroundings

# torch_npu -> the CANN that it is for, by torch_npu's table of versions (COMPATIBILITY.md of Ascend/pytorch).
_CANN_OF = {
    "2.7.1.post8": (9, 1), "2.9.0.post6": (9, 1), "2.10.0.post4": (9, 1), "2.11.0": (9, 1), "2.12.0": (9, 1),
    "2.7.1.post2": (8, 5), "2.9.0": (8, 5),
}  # fmt: skip
# What CANN's operator compiler imports: its own packages, and those that its installation guide asks for.
_COMPILERS = ("te", "tbe", "tvm", "topi", "numpy", "decorator", "sympy", "scipy", "attr", "psutil")
_MOST_INFO = 65536  # characters of CANN's files about an installation, which have some hundred


def _driver(around: Surroundings) -> Iterator[Finding]:
    line = host.npu_line()
    found = f"{len(host.cards())} card(s)" + (f" of the series {line.upper()}" if line else "")
    yield from errors_or("NPU driver", host.driver_faults(around.environ), found)


def _torch_npu(around: Surroundings) -> Iterator[Finding]:
    found = f"torch {installed('torch')}, torch_npu {installed('torch_npu')}"
    if "0" == around.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"):
        found += "; TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps it out of ComfyUI's process, and ranks load it all the same"
    yield from errors_or("torch_npu", host.package_faults(), found)


def _mindiesd(around: Surroundings) -> Iterator[Finding]:
    version = installed("mindiesd")
    if fault := host.mindiesd_fault():
        yield warning("mindiesd", fault)
    else:
        yield fine("mindiesd", version or "not installed, which is optional")


def _cann(around: Surroundings) -> Iterator[Finding]:
    toolkit, _ = _cann_versions(around)
    yield from errors_or("CANN", host.cann_faults(around.environ), toolkit or "set up, of an unknown version")


def _cann_version(around: Surroundings) -> Iterator[Finding]:
    """Whether CANN's parts are of one version, and not older than what torch_npu is for."""
    toolkit, operators = _cann_versions(around)
    npu = installed("torch_npu")
    needed = _CANN_OF.get(npu or "")
    if toolkit and operators and toolkit != operators:
        yield warning("CANN's version", HostFault(
            "AV-1003",
            f"CANN's toolkit is {toolkit}, but its operators are {operators}.",
            "Install both packages of one version.",
        ))  # fmt: skip
    elif toolkit and needed and _release(toolkit) < needed:
        yield warning("CANN's version", HostFault(
            "AV-1003",
            f"CANN is {toolkit}, but torch_npu {npu} is for CANN {needed[0]}.{needed[1]}.",
            "Install that CANN, or the torch_npu that torch_npu's table of versions names for yours.",
        ))  # fmt: skip
    elif toolkit and needed:
        yield fine("CANN's version", f"{toolkit}; torch_npu {npu} is for {needed[0]}.{needed[1]}")


def _compiler(around: Surroundings) -> Iterator[Finding]:
    """Whether PYTHONPATH and LD_LIBRARY_PATH lead to the CANN of ASCEND_HOME_PATH."""
    home = around.environ.get("ASCEND_HOME_PATH")
    if not home or not Path(home).is_dir():
        return
    faults = [*_python_faults(around.environ.get("PYTHONPATH", ""), Path(home)),
              *_library_faults(around.environ.get("LD_LIBRARY_PATH", ""), Path(home))]  # fmt: skip
    yield from (warning("CANN's search paths", fault) for fault in faults)
    if not faults:
        yield fine("CANN's search paths", "PYTHONPATH and LD_LIBRARY_PATH lead to this CANN")


def _python_faults(paths: str, home: Path) -> Iterator[HostFault]:
    folders = [Path(path) for path in paths.split(":") if path]
    foreign = [folder for folder in folders if not _inside(folder, home)]
    hidden = [f"{folder}/{name}" for folder in foreign for name in _COMPILERS if _holds(folder, name)]
    if hidden:
        yield HostFault(
            "AV-1011",
            f"PYTHONPATH hides packages that CANN's operator compiler imports, by {', '.join(hidden[:4])}.",
            "Remove that folder from PYTHONPATH in the shell that starts ComfyUI.",
        )
    elif folders and len(foreign) == len(folders):
        yield HostFault(
            "AV-1011",
            f"PYTHONPATH is {paths!r}, without CANN's folders, so its operator compiler does not find te and tbe.",
            f"Unset PYTHONPATH. {host.SET_ENV}.",
        )


def _library_faults(paths: str, home: Path) -> Iterator[HostFault]:
    folders = [Path(path) for path in paths.split(":") if path]
    first = next((folder for folder in folders if _holds(folder, host.LIBRARIES[0])), None)
    if first is not None and not _inside(first, home):
        yield HostFault(
            "AV-1011",
            f"LD_LIBRARY_PATH finds CANN's libraries in {first}, but ASCEND_HOME_PATH is {home}.",
            f"Unset LD_LIBRARY_PATH. {host.SET_ENV}, of one CANN only.",
        )


def _inside(folder: Path, home: Path) -> bool:
    """Whether a folder is of this CANN, whose folders are often links to each other."""
    return folder.is_relative_to(home) or folder.resolve().is_relative_to(home.resolve())


def _holds(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except OSError:
        return False  # not readable for this user, and so not for a compiler


def _cann_versions(around: Surroundings) -> tuple[str | None, str | None]:
    """The versions of CANN's toolkit and operators, from the files that their installation leaves."""
    home = around.environ.get("ASCEND_HOME_PATH")
    return tuple(_version_in(Path(home), part) if home else None for part in ("toolkit", "ops"))


def _version_in(home: Path, part: str) -> str | None:
    for file in sorted(home.glob(f"*-linux/ascend_{part}_install.info")):
        try:
            with file.open(errors="replace") as lines:
                found = re.search(r"^version=(\S{1,40})$", lines.read(_MOST_INFO), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found[1]
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


NPU_CHECKS = (_driver, _torch_npu, _mindiesd, _cann, _cann_version, _compiler)
