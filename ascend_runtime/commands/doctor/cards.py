"""Checks of the cards' health, and of the memory that other programs hold on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...hardware import host
from ...hardware.host import HostFault
from ...hardware.versions import installed
from . import processes
from .findings import Finding, error, errors_or, fine, warning
from .surroundings import Surroundings, gpus

# Of npu-smi info, whose layout has been the same from 22.0 to 25.5: two lines a chip, then the processes. The columns
# of the second line differ, but its last pair is the memory.
_CARD = re.compile(r"\|\s*(\d+)\s+([A-Za-z0-9_]+)\s*\|\s*([A-Za-z]+)\s*\|")
_CHIP = re.compile(r"\|\s*(\d+)(?:\s+\S+)?\s*\|\s*[0-9A-Fa-f]{4}:[0-9A-Fa-f:.]+\s*\|(.*)\|")
_PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")
_PROCESS = re.compile(r"\|\s*(\d+)\s+(\d+)\s*\|\s*(\d+)\s*\|([^|]*)\|\s*(\d+)\s*\|")
_IDLE = 6000  # MB; a card of 32 or 64 GB without processes reports 2900 to 3500 MB in use
_SMALL = 1024  # MB of another program that are not worth a word: monitors, a second context of the same job
_GPU = "index,uuid,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"


@dataclass(frozen=True)
class CardState:
    """A chip. used, total: MB of its memory. holders: process id -> (its name, MB)."""

    name: str
    health: str
    used: int
    total: int
    holders: dict[int, tuple[str, int]] = field(default_factory=dict)


def npus(around: Surroundings) -> Iterator[Finding]:
    if not host.cards():
        return  # which the check of the driver reports
    if not (tool := around.tool("npu-smi")):
        yield fine("cards", "health and memory were not checked: there is no npu-smi in PATH")
        return
    try:
        states = parsed(around.output_of(tool, "info"))
    except OSError as failure:
        yield error("cards", HostFault(
            "AV-1012", f"`npu-smi info` cannot ask the driver: {failure}.",
            "Restart the driver or the machine. In a container, mount /usr/local/Ascend/driver, and add its lib64 and "
            "the folders driver and common in it to LD_LIBRARY_PATH.",
        ))  # fmt: skip
        return
    yield from _states("NPU", states, around)


def parsed(text: str) -> list[CardState]:
    """The chips that `npu-smi info` lists."""
    found, number, name, health = {}, None, "", ""
    for line in text.splitlines():
        if process := _PROCESS.match(line):
            holders = found[process[1], process[2]].holders if (process[1], process[2]) in found else {}
            holders[int(process[3])] = (process[4].strip(), int(process[5]))
        elif card := _CARD.match(line):
            number, name, health = card.groups()
        elif (chip := _CHIP.match(line)) and number is not None and (pairs := _PAIR.findall(chip[2])):
            used, total = map(int, pairs[-1])
            found[number, chip[1]] = CardState(f"NPU {number} chip {chip[1]} ({name})", health, used, total)
    return list(found.values())


def nvidia(around: Surroundings) -> Iterator[Finding]:
    """GPUs: whether torch is built for them, their health and memory."""
    torch = installed("torch") or ""
    faults = []
    if torch.endswith("+cpu"):
        faults.append(HostFault("AV-1017", f"torch is {torch}, which is built without CUDA.",
                                "Install torch with CUDA, from https://pytorch.org/get-started/locally."))  # fmt: skip
    if not gpus(around.root):
        faults.append(HostFault(
            "AV-1017", f"There is no {around.root / 'dev'}/nvidia0: no GPU is visible.",
            "Install NVIDIA's driver; start a container with `--gpus all`.",
        ))  # fmt: skip
    yield from errors_or("GPUs", faults, f"{len(gpus(around.root))} GPU(s), torch {torch}")
    if tool := around.tool("nvidia-smi"):
        try:
            yield from _states("GPU", _gpu_states(around, tool), around)
        except OSError as failure:
            yield error("cards", HostFault("AV-1012", f"`nvidia-smi` cannot ask the driver: {failure}.",
                                           "Restart the machine, or install the driver again."))  # fmt: skip


def _gpu_states(around: Surroundings, tool: str) -> list[CardState]:
    form = "--format=csv,noheader,nounits"
    apps = [line.split(", ") for line in around.output_of(
        tool, "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", form).splitlines()]  # fmt: skip
    holders: dict[str, dict[int, tuple[str, int]]] = {}
    for uuid, pid, used, *name in (row for row in apps if len(row) >= 3 and row[1].isdigit()):
        holders.setdefault(uuid, {})[int(pid)] = (", ".join(name), int(used) if used.isdigit() else 0)
    rows = [line.split(", ") for line in around.output_of(tool, f"--query-gpu={_GPU}", form).splitlines()]
    return [
        CardState(f"GPU {number} ({name})", _health(faults), int(used), int(total), holders.get(uuid, {}))
        for number, uuid, name, total, used, faults in (row for row in rows if len(row) == 6)
        if total.isdigit() and used.isdigit()
    ]  # fmt: skip


def _health(ecc: str) -> str:
    """A GPU's health in a word. ecc: its uncorrected memory errors, as nvidia-smi writes their number."""
    return f"{ecc} uncorrected ECC errors" if ecc.isdigit() and int(ecc) else "OK"


def _states(word: str, states: list[CardState], around: Surroundings) -> Iterator[Finding]:
    if not states:
        yield fine("cards", "health and memory were not checked: the tool's output lists no card")
        return
    ours, visible = processes.ranks_in_use(around), processes.pids(around)
    sick = [HostFault(
        "AV-1013", f"{state.name} reports its health as {state.health}.",
        "See the driver's log (`dmesg`; for NPUs also `npu-smi info -t health -i NUMBER`). Restart the machine, or "
        "leave the card out by ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES.",
    ) for state in states if state.health != "OK"]  # fmt: skip
    yield from errors_or(f"{word} health", sick, f"{len(states)} chip(s) are OK")
    taken = [finding for state in states if (finding := _taken(word, state, ours, visible)) is not None]
    yield from taken
    if not taken:
        free = min(state.total - state.used for state in states) / 1000
        by_ours = ", apart from ranks in use" if ours else ""
        yield fine(f"{word} memory", f"no other program uses a card{by_ours}; at least {free:.1f} GB are free on each")


def _taken(word: str, state: CardState, ours: set[int], visible: set[int]) -> Finding | None:
    """What others hold on a chip. In a container, a driver may list processes by the numbers of the machine, so ranks
    cannot be recognised."""
    others = {pid: held for pid, held in state.holders.items() if pid not in ours and not (ours and pid not in visible)}
    held = sum(used for _, used in others.values())
    hidden = not state.holders and state.used > _IDLE and word == "NPU"
    if held < _SMALL and not hidden:
        return None
    who = "a program that cannot be seen from here" if hidden else ", ".join(
        f"process {pid} ({name or 'of an unknown name'})" for pid, (name, _) in others.items())  # fmt: skip
    held = state.used if hidden else held
    fault = HostFault(
        "AV-1105", f"{held / 1000:.1f} of {state.total / 1000:.1f} GB of {state.name} are used by {who}.",
        "End that program, or choose other cards by ASCEND_RT_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES. ComfyUI itself "
        "uses a card unless it is started with --cpu.",
    )  # fmt: skip
    return (error if held > state.total / 2 else warning)(f"{word} memory", fault)
