"""This host as the ranks on its NPUs need it: what is wrong with it, and what cures the known failures of a rank.

Looks at packages, device files and libraries, and never imports torch_npu, which ComfyUI's process has no use for.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, Mapping

logger = logging.getLogger(__name__)

DEVICE_FILES = Path("/dev")
PCI_DEVICES = Path("/sys/bus/pci/devices")
HUAWEI = "0x19e5"
# The lines of NPUs by PCI device: 910, 910B, 910_93, 310P (Huawei's driver tools, such as `lspci -d 19e5:`). A 950's
# number is in no public source yet.
PCI_LINES = {"0xd801": "910", "0xd802": "a2", "0xd803": "a3", "0xd500": "duo"}
LIBRARIES = ("libascendcl.so", "libhccl.so")  # of CANN, without which torch_npu is not imported
SET_ENV = (
    "In the shell that starts ComfyUI, `source /usr/local/Ascend/ascend-toolkit/set_env.sh` "
    "(newer CANN: /usr/local/Ascend/cann/set_env.sh)"
)
DEVICE_OPTIONS = "/dev/davinci0 (one for each card), /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"


def cards() -> list[int]:
    """The NPUs that this machine, or this container, has been given: the numbers of their device files."""
    return sorted(int(file.name[7:]) for file in DEVICE_FILES.glob("davinci[0-9]*") if file.name[7:].isdigit())


def line() -> str | None:
    """The line of this machine's NPUs, as `devices.card` calls it, found without starting their driver: "a2", "a3",
    "duo", or "910" (of 2019). None where that is not known, or there are several."""
    devices = [device for device in PCI_DEVICES.glob("*") if _read(device / "vendor") == HUAWEI]
    found = {PCI_LINES.get(_read(device / "device")) for device in devices} - {None}
    return found.pop() if len(found) == 1 else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # no such device any longer, or not for this user


def visible_cards(environ: Mapping[str, str]) -> int:
    """How many of these torch can use in a process with this environment."""
    if find_spec("torch_npu") is None:
        return 0
    chosen = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return len([card for card in chosen.split(",") if card.strip()]) if chosen else len(cards())


def problems(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What keeps ranks with this environment from starting on NPUs: a sentence with the cause and one with the cure."""
    return [*_packages(), *_driver(environ), *_cann(environ)]


def require_npu(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError with all `problems`, where there are any."""
    if found := problems(environ):
        raise ValueError("Ranks cannot start on the NPUs of this host:\n- " + "\n- ".join(found))
    warn_of_mindiesd()


@lru_cache(maxsize=None)
def warn_of_idle_npus() -> None:
    """Says once why a host that has torch_npu computes on something else."""
    if find_spec("torch_npu") is not None:
        logger.warning("torch_npu is installed, but no NPU is used: %s", " ".join(problems() or ["none is visible."]))


@lru_cache(maxsize=None)
def warn_of_mindiesd() -> None:
    """Says once where MindIE SD, which is optional, was not made for this torch."""
    sd, torch = _version("mindiesd"), _version("torch")
    if sd is None or torch is None:
        return
    files = " ".join(str(file) for file in metadata.files("mindiesd") or ())
    made_for = {f"{major}.{minor}" for major, minor in re.findall(r"plugin/torch(\d)(\d+)/", files)}
    if made_for and _release(torch) not in made_for:
        logger.warning(
            "mindiesd %s has plug-ins for torch %s, and this is torch %s: its operators are not used. Install a torch "
            "and torch_npu of these, or uninstall mindiesd.",
            sd, ", ".join(sorted(made_for, key=lambda release: int(release[2:]))), torch,
        )  # fmt: skip


# What may be wrong


def _packages() -> Iterator[str]:
    if find_spec("torch_npu") is None:
        yield (
            "torch_npu is not installed in this Python. Install the torch_npu of the same release as torch "
            f"{_version('torch')}, and the CANN that its page names for it."
        )
        return
    torch, npu = _version("torch"), _version("torch_npu")
    if torch and npu and _release(torch) != _release(npu):
        yield (
            f"torch is {torch} and torch_npu is {npu}; each torch_npu is made for one torch. Install torch "
            f"{_release(npu)}, or torch_npu {_release(torch)}."
        )


def _driver(environ: Mapping[str, str]) -> Iterator[str]:
    there = cards()
    if not there and shutil.which("npu-smi", path=environ.get("PATH")) is None:
        yield (
            f"There is no {DEVICE_FILES}/davinci* and no npu-smi: the NPU driver is not there. Install it, and the "
            f"firmware; in a container, give it the devices {DEVICE_OPTIONS}, and mount /usr/local/Ascend/driver and "
            "/usr/local/bin/npu-smi."
        )
    elif not there or not (DEVICE_FILES / "davinci_manager").exists():
        missing = "davinci_manager" if there else "davinci*"
        yield (
            f"There is no {DEVICE_FILES}/{missing}, though this host has the driver. In a container, give it the "
            f"devices {DEVICE_OPTIONS} (docker's --device); on the host itself, look at `npu-smi info`."
        )
    chosen = re.findall(r"\d+", environ.get("ASCEND_RT_VISIBLE_DEVICES", ""))
    absent = [card for card in chosen if there and int(card) >= len(there)]
    if absent:
        yield (
            f"ASCEND_RT_VISIBLE_DEVICES names {', '.join(absent)}, and the {len(there)} card(s) here are numbered from "
            f"0 to {len(there) - 1}. Name some of these, or unset it."
        )


def _cann(environ: Mapping[str, str]) -> Iterator[str]:
    home = environ.get("ASCEND_HOME_PATH")
    if not home:
        yield f"CANN is not set up: ASCEND_HOME_PATH is not set. {SET_ENV}."
    elif not Path(home).is_dir():
        yield f"CANN is not set up: ASCEND_HOME_PATH is {home!r}, which is no folder. {SET_ENV}."
    for library in LIBRARIES if home else ():
        try:
            ctypes.CDLL(library)  # looked for where torch_npu would
        except OSError as error:
            yield f"CANN's {library} cannot be loaded ({error}). {SET_ENV}, and check that the driver is installed too."


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """major.minor"""
    return ".".join(version.split(".")[:2])


# What cures a rank's failure


def _versions() -> str:
    names = ("torch", "torch_npu", "mindiesd", "diffusers", "transformers")
    return ", ".join(f"{name} {_version(name)}" for name in names if _version(name))


_LESS_ON_A_CARD = (
    "Less is taken by fewer frames or a smaller size; more ranks, which share a video; fsdp, with which they share the "
    "weights; quantization w8a8_dynamic; the text encoder's placement cpu"
)
_CURES = (
    (r"libascend_hal\.so|libdrvdsmi_host\.so|libdcmi\.so",
     "The NPU driver's libraries are missing: install the driver; in a container, mount /usr/local/Ascend/driver and "
     "have /usr/local/Ascend/driver/lib64 and its folders driver and common in LD_LIBRARY_PATH."),
    (r"lib(hccl|ascendcl|acl_op_compiler|ge_runner|graph|acl_tdt_channel)\.so.*cannot open", f"{SET_ENV}."),
    (r"cannot import name|undefined symbol|Failed to find function",
     "A package or CANN is of another version than the one that uses it was made for. Here are {versions}. torch_npu "
     "must be of torch's release, and CANN the one that torch_npu's page names."),
    (r"HcclGetRootInfo.*error code is (7|11)\b",
     "HCCL could not take its ports, 60000 to 60031 unless set otherwise, or not reach a rank over them. Leave "
     "HCCL_IF_BASE_PORT unset and HCCL_HOST_SOCKET_PORT_RANGE at auto; with a CANN that does not know the latter, "
     "`sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031`. End other programs that use the same cards."),
    (r"(?<!CUDA )(?<!CUDA error: )\bout of memory\b",
     f"The card's memory is full. See with `npu-smi info` whether another program uses it. {_LESS_ON_A_CARD}; "
     "heads_per_call; the variable TASK_QUEUE_ENABLE=1, as level 2 keeps more for the operators in its queue."),
    (r"CUDA (error: )?out of memory",
     f"The GPU's memory is full. See with `nvidia-smi` whether another program uses it. {_LESS_ON_A_CARD}."),
    (r"DefaultCPUAllocator|\bMemoryError\b|Cannot allocate memory|std::bad_alloc",
     "This machine's memory is full, or what a limit leaves of it (`ulimit -v`, a container's). See with `free -h` and "
     "`docker stats` what takes it. Less is taken by fewer frames or a smaller size; dtype bfloat16, half of the "
     "float32 that a CPU's model has by default; fewer ranks, or fsdp, with which they share the weights; quantization "
     "w8a8_dynamic; or end other programs."),
    (r"can't start new thread|Thread creation failed|Resource temporarily unavailable",
     "No more threads can be started: see `ulimit -u`, `ulimit -v`, a container's limit (`docker run --pids-limit`). "
     "With OMP_NUM_THREADS ranks start fewer, and fewer ranks do so too."),
    (r"was killed by SIGKILL",
     "If nobody ended the rank, the kernel may have for want of memory: see `dmesg`, and in a container its limit "
     "(`docker stats`). Each rank holds weights of its own: take fewer ranks, fsdp, dtype bfloat16 on a CPU, fewer "
     "frames, a smaller size or model, or a machine with more memory."),
    (r"was killed by SIGBUS",
     "A model's file was cut short, or its disk failed, while ranks used it: a CPU's ranks have weights as they lie on "
     "disk. Write the file anew, under another name first, which you then give the old one's (mv); the next job starts "
     "new ranks. In a container, look for want of shared memory too: `df /dev/shm`."),
)  # fmt: skip


def advise(failure: str) -> str:
    """A rank's failure with what cures it, where that is known."""
    cures = [cure.replace("{versions}", _versions()) for pattern, cure in _CURES if re.search(pattern, failure)]
    return "\n".join([failure, *(f"What helps: {cure}" for cure in cures)])
