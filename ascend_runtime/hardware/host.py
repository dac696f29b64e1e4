"""Checks that this host can run ranks on its NPUs, and gives advice for known failures of ranks.

It checks packages, device files and libraries without importing torch_npu, which ComfyUI's process does not need.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, Mapping

from ..errors import coded
from .versions import installed, package_versions

logger = logging.getLogger(__name__)

DEVICE_FILES = Path("/dev")
PCI_DEVICES = Path("/sys/bus/pci/devices")
HUAWEI = "0x19e5"
# PCI device -> product line: 910, 910B, 910_93, 310P (Huawei's driver tools, such as `lspci -d 19e5:`). The 950's
# number has not been published yet.
PCI_LINES = {"0xd801": "910", "0xd802": "a2", "0xd803": "a3", "0xd500": "310P"}
# Product lines that cannot run these models -> the card, and why. Sources, by their tables of products: hicann/ops-nn,
# conv/convolution_forward/docs/aclnnConvolution.md; hicann/hccl, HcclBatchSendRecv.md; Ascend/op-plugin,
# torch_npu-npu_fused_infer_attention_score.md; bfloat16 is for SoCs from 910B1 on (torch_npu's NpuVariables.h).
UNFIT = {
    "910": "an Ascend 910 of 2019, which has no bfloat16, nor CANN's operators for convolution and attention",
    "310P": "of the 310P series (Atlas 300I Duo), which has no bfloat16, convolutions of videos only in float16, and "
            "neither CANN's operator for attention nor HCCL's exchanges between two cards",
    "310B": "of the 310B series (Atlas 200I / 500 A2), which has no convolutions of videos",
}  # fmt: skip
LIBRARIES = ("libascendcl.so", "libhccl.so")  # CANN's libraries that torch_npu needs
SET_ENV = (
    "In the shell that starts ComfyUI, `source /usr/local/Ascend/ascend-toolkit/set_env.sh` "
    "(newer CANN: /usr/local/Ascend/cann/set_env.sh)"
)
DEVICE_OPTIONS = "/dev/davinci0 (one for each card), /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"


@dataclass(frozen=True)
class HostFault:
    """What is wrong with a host, and what cures it. code: of errors.CODES."""

    code: str
    found: str
    cure: str

    def __str__(self) -> str:
        return coded(self.code, f"{self.found} {self.cure}")


def cards() -> list[int]:
    """The NPUs of this machine or container, as the numbers of their device files."""
    return sorted(int(file.name[7:]) for file in DEVICE_FILES.glob("davinci[0-9]*") if file.name[7:].isdigit())


def npu_line() -> str | None:
    """The product line of this machine's NPUs, found without starting their driver: "a2", "a3" (as in `devices.card`)
    or one of UNFIT. None if it is unknown, or there are several."""
    devices = [device for device in PCI_DEVICES.glob("*") if _read(device / "vendor") == HUAWEI]
    found = {PCI_LINES.get(_read(device / "device")) for device in devices} - {None}
    return found.pop() if len(found) == 1 else None


def unfit(line: str) -> HostFault:
    """Why NPUs of a product line of UNFIT are refused."""
    return HostFault(
        "AV-1008",
        f"This NPU is {UNFIT[line]}.",
        "Use cards of the A2, A3 or 950 series, such as those of an Atlas 800I A2 or A3; or set device to 'cpu'.",
    )


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # the device has been removed, or is not readable for this user


def visible_cards(environ: Mapping[str, str]) -> int:
    """The number of cards that torch can use in a process with this environment."""
    if find_spec("torch_npu") is None:
        return 0
    chosen = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return len([card for card in chosen.split(",") if card.strip()]) if chosen else len(cards())


def problems(environ: Mapping[str, str] = os.environ) -> list[HostFault]:
    """The reasons why ranks with this environment cannot start on NPUs, each with its cure."""
    return [*package_faults(), *driver_faults(environ), *cann_faults(environ)]


def require_npu(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError with all `problems`, if there are any."""
    if found := problems(environ):
        raise ValueError("Ranks cannot start on the NPUs of this host:\n- " + "\n- ".join(map(str, found)))
    warn_of_mindiesd()


@lru_cache(maxsize=None)
def warn_of_idle_npus() -> None:
    """Logs once why a host with torch_npu does not use NPUs."""
    if find_spec("torch_npu") is not None:
        logger.warning("torch_npu is installed, but no NPU is used: %s", 
                       " ".join(map(str, problems())) or "none is visible.")  # fmt: skip


@lru_cache(maxsize=None)
def warn_of_mindiesd() -> None:
    """Logs once if the installed MindIE SD, which is optional, cannot be used with this torch."""
    if fault := mindiesd_fault():
        logger.warning("%s", fault)


def mindiesd_fault() -> HostFault | None:
    """Why the installed MindIE SD cannot be used with this torch; None if it can be, or is not installed."""
    sd, torch = installed("mindiesd"), installed("torch")
    plugins = _mindiesd_plugins() if sd and torch else {}
    if not plugins:
        return None
    own = plugins.get(_release(torch))
    if own is None:
        made_for = ", ".join(sorted(plugins, key=lambda release: int(release[2:])))
        return HostFault(
            "AV-1010",
            f"mindiesd {sd} has plug-ins for torch {made_for}, but this is torch {torch}, so its operators are not "
            "used.",
            "Install one of these versions of torch and torch_npu, or uninstall mindiesd.",
        )
    # As in the wheel 3.1.0 for Python 3.11 on x86_64. torch 2.9 changed the layout of what a plug-in registers
    # (c10::KernelFunction), so that loading this one ends the process.
    if _release(torch) == "2.9" and own and own == plugins.get("2.7"):
        return HostFault(
            "AV-1010",
            f"mindiesd {sd} contains its plug-in for torch 2.7 as the one for torch 2.9, which would end the process, "
            "so its operators are not used.",
            "Use torch 2.7 or 2.10 - 2.13, or a Python whose mindiesd is complete, such as 3.12; or uninstall "
            "mindiesd.",
        )
    return None


def _mindiesd_plugins() -> dict[str, str | None]:
    """Release of torch -> hash of MindIE SD's plug-in for it; None where its wheel lists no hash."""
    found = {}
    for file in metadata.files("mindiesd") or ():
        if made_for := re.search(r"plugin/torch(\d)(\d+)/", str(file)):
            found[f"{made_for[1]}.{made_for[2]}"] = file.hash and file.hash.value
    return found


# Checks


def package_faults() -> Iterator[HostFault]:
    """Whether torch_npu is installed, for this torch."""
    torch, npu = installed("torch"), installed("torch_npu")
    if find_spec("torch_npu") is None:
        yield HostFault(
            "AV-1006",
            "torch_npu is not installed in this Python.",
            f"Install the torch_npu of the same release as torch {torch}, and the CANN version that its documentation "
            "requires.",
        )
    elif torch and npu and _release(torch) != _release(npu):
        yield HostFault(
            "AV-1003",
            f"torch is {torch} and torch_npu is {npu}, but their releases must match.",
            f"Install torch {_release(npu)}, or torch_npu {_release(torch)}.",
        )


def driver_faults(environ: Mapping[str, str]) -> Iterator[HostFault]:
    """Whether the driver, its device files and the chosen cards are there, and the cards can run the models."""
    there = cards()
    if (line := npu_line()) in UNFIT:
        yield unfit(line)
    if not there and shutil.which("npu-smi", path=environ.get("PATH")) is None:
        yield HostFault(
            "AV-1001",
            f"There is no {DEVICE_FILES}/davinci* and no npu-smi: the NPU driver is not installed.",
            f"Install it and the firmware; for a container, add the devices {DEVICE_OPTIONS}, and mount "
            "/usr/local/Ascend/driver and /usr/local/bin/npu-smi.",
        )
    elif not there or not (DEVICE_FILES / "davinci_manager").exists():
        missing = "davinci_manager" if there else "davinci*"
        yield HostFault(
            "AV-1007",
            f"There is no {DEVICE_FILES}/{missing}, although this host has the driver.",
            f"For a container, add the devices {DEVICE_OPTIONS} (docker's --device); on the host itself, check "
            "`npu-smi info`.",
        )
    chosen = re.findall(r"\d+", environ.get("ASCEND_RT_VISIBLE_DEVICES", ""))
    absent = [card for card in chosen if there and int(card) >= len(there)]
    if absent:
        yield HostFault(
            "AV-1009",
            f"ASCEND_RT_VISIBLE_DEVICES contains {', '.join(absent)}, but the {len(there)} card(s) here are numbered 0 "
            f"to {len(there) - 1}.",
            "Use these numbers, or unset it.",
        )


def cann_faults(environ: Mapping[str, str]) -> Iterator[HostFault]:
    """Whether CANN is set up, and its libraries can be loaded."""
    home = environ.get("ASCEND_HOME_PATH")
    if not home:
        yield HostFault("AV-1002", "CANN is not set up: ASCEND_HOME_PATH is not set.", f"{SET_ENV}.")
    elif not Path(home).is_dir():
        yield HostFault(
            "AV-1002", f"CANN is not set up: ASCEND_HOME_PATH is {home!r}, which is not a folder.", f"{SET_ENV}."
        )
    for library in LIBRARIES if home else ():
        try:
            ctypes.CDLL(library)  # uses the same search path as torch_npu
        except OSError as error:
            yield HostFault(
                "AV-1002",
                f"CANN's {library} cannot be loaded ({error}).",
                f"{SET_ENV}, and check that the driver is installed.",
            )


def _release(version: str) -> str:
    """major.minor"""
    return ".".join(version.split(".")[:2])


# Advice for failures


_LESS_ON_A_CARD = (
    "To use less, reduce the frames or the size; use more ranks per video; shard the weights by fsdp; set quantization "
    "to w8a8_dynamic, or the text encoder's placement to cpu"
)
# (a pattern in what a rank reported or printed last, the code of the cause, what helps). EI0002, EI0006: HCCL's codes.
_CURES = (
    (r"libascend_hal\.so|libdrvdsmi_host\.so|libdcmi\.so", "AV-1001",
     "The NPU driver's libraries are missing: install the driver; for a container, mount /usr/local/Ascend/driver and "
     "add /usr/local/Ascend/driver/lib64 and its folders driver and common to LD_LIBRARY_PATH."),
    (r"lib(hccl|ascendcl|acl_op_compiler|ge_runner|graph|acl_tdt_channel)\.so.*cannot open", "AV-1002", f"{SET_ENV}."),
    (r"cannot import name|undefined symbol|Failed to find function", "AV-1003",
     "Versions of packages or CANN do not match. Installed are {versions}. torch_npu must have torch's release, and "
     "CANN the version that torch_npu's documentation requires."),
    (r"Unsupported soc version", "AV-1004",
     "This torch_npu does not know this card. Installed are {versions}. For the 950 series, 2.7.1.post8, 2.9.0.post6 "
     "and 2.13.0 do, each with the CANN that its documentation requires."),
    (r"Unrecognized (CachingAllocator option|key)", "AV-1005",
     "This torch_npu does not know a key of PYTORCH_NPU_ALLOC_CONF. Installed are {versions}. Leave the key out, or "
     "install a torch_npu that has it."),
    (r"HcclGetRootInfo.*error code is (7|11)\b", "AV-1101",
     "HCCL could not bind its ports (60000 to 60031 by default), or not reach a rank through them. Leave "
     "HCCL_IF_BASE_PORT unset and HCCL_HOST_SOCKET_PORT_RANGE at auto; if CANN does not support the latter, run "
     "`sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031`. End other programs that use the same cards."),
    (r"(?<!CUDA )(?<!CUDA error: )\bout of memory\b", "AV-1201",
     f"The card's memory is full. Check with `npu-smi info` whether another program uses it. {_LESS_ON_A_CARD}; set "
     "heads_per_call, or the variable TASK_QUEUE_ENABLE=1, as level 2 needs more memory for its queue."),
    (r"CUDA (error: )?out of memory", "AV-1201",
     f"The GPU's memory is full. Check with `nvidia-smi` whether another program uses it. {_LESS_ON_A_CARD}."),
    (r"DefaultCPUAllocator|\bMemoryError\b|Cannot allocate memory|std::bad_alloc", "AV-1202",
     "This machine's memory is full, or a limit is reached (`ulimit -v`, a container's). Check with `free -h` and "
     "`docker stats` what uses it. To use less, reduce the frames or the size; set dtype bfloat16, half the size of a "
     "CPU's default float32; use fewer ranks, or shard the weights by fsdp; set quantization w8a8_dynamic; or end "
     "other programs."),
    (r"can't start new thread|Thread creation failed|Resource temporarily unavailable", "AV-1102",
     "No more threads can be started: check `ulimit -u`, `ulimit -v`, a container's limit (`docker run --pids-limit`). "
     "Reduce OMP_NUM_THREADS or the number of ranks."),
    (r"No space left on device", "AV-1316",
     "A disk is full, or the memory for shared files. Check with `df -h`, and /dev/shm with it; in a container, give "
     "more by `docker run --shm-size`."),
    (r"\[Errno 5\]|Input/output error|Stale file handle|Transport endpoint is not connected", "AV-1313",
     "The disk or the network share with the model's files returned an error. Check `dmesg` and the share's server, or "
     "copy the files to another disk."),
    (r"EI0006|Getting socket times out|connectFullMesh failed", "AV-1509",
     "Ranks did not connect to each other. Check that each rank has a healthy card of its own (`npu-smi info`), and "
     "that no firewall is between them. If a rank is only late, set HCCL_CONNECT_TIMEOUT to more seconds."),
    (r"EI0002|Watchdog caught collective operation timeout|Timed out waiting \d+ms for (recv|send)", "AV-1508",
     "A rank waited in a collective for one that did not come. See the log of the other ranks for an earlier error, "
     "and `npu-smi info` for a card that is not healthy. If a step takes longer than HCCL_EXEC_TIMEOUT, set it to more "
     "seconds."),
    (r"was killed by SIGKILL", "AV-1501",
     "If nobody killed the rank, the kernel may have, because memory was full: check `dmesg`, and in a container its "
     "limit (`docker stats`). Each rank has its own weights: use fewer ranks, fsdp, dtype bfloat16 on a CPU, fewer "
     "frames, a smaller size or model, or a machine with more memory."),
    (r"was killed by SIGBUS", "AV-1502",
     "A model's file was truncated, or its disk failed, while ranks used it: on a CPU, weights are mapped from disk. "
     "Write the file again under another name, and rename it (mv) when it is complete; the next job starts new ranks. "
     "In a container, also check that shared memory is not full: `df /dev/shm`."),
)  # fmt: skip


BY_THE_KERNEL = "by the kernel, as the host's memory was full"  # what the death of a rank says of itself
_FULL = ("AV-1201", "AV-1202")  # a card's memory, and the host's


def out_of_device_memory(failure: str) -> bool:
    """Whether a rank failed because a device's memory did not suffice."""
    return any(code == "AV-1201" and re.search(pattern, failure) for pattern, code, _ in _CURES)


def out_of_memory(failure: str) -> bool:
    """Whether a rank failed because a device's memory, or the host's, did not suffice."""
    found = any(code in _FULL and re.search(pattern, failure) for pattern, code, _ in _CURES)
    return found or BY_THE_KERNEL in failure


def advise(failure: str, code: str) -> str:
    """A rank's failure, with the code of its cause in front, and advice if the cause is known. code: if it is not."""
    cures = [cure for cure in _CURES if re.search(cure[0], failure)]
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    helps = [f"What helps ({known}): {text.replace('{versions}', versions)}" for _, known, text in cures]
    cause = cures[0][1] if cures else code
    return "\n".join([coded(cause, failure), *helps])
