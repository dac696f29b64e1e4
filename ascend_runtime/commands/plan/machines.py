"""The machine that a plan is for: the one that arguments describe, or this host."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from ...hardware import devices, host, memory
from ...planner.facts import Machine
from ...planner.rates import CARD_FIGURES, gpu_named
from ...specs.links import MachineLink
from ..video_options import counted

USABLE = 0.95  # an assumption: the part of a card's memory that the driver and the framework leave
HOST_MEMORY_PER_CARD = 128e9  # an assumption: servers of 8 cards are sold with 1 to 2 TB
HCCL_BUFFERS = 2 * 200 * 2**20  # of each communicator, see hardware.devices.communicator_bytes
SERVER = 8  # cards, if none is found and no number is given
FIRST_BYTE = 50e-6  # seconds, an assumption: the order of a small message through a switch


def machine_of(arguments: Namespace) -> tuple[Machine, list[str]]:
    """The machine, and what is assumed about it."""
    found = found_kind()
    card, notes = arguments.card, []
    if card is None:
        card = found_card(found)
        notes.append(f"cards: {counted(devices.count_visible(found), found)} of this host")
    kind = CARD_FIGURES[card].kind
    here = kind == found and (kind == "cpu" or found_card(found) == card)
    count = arguments.machines
    each = arguments.ranks // count or (devices.count_visible(kind) if here else SERVER)
    on_host = _host_memory(arguments, each, here, notes)
    on_device = _device_memory(arguments, kind, card, each, on_host, notes)
    machine = Machine(kind, card, count * each, on_device, on_host, HCCL_BUFFERS if kind == "npu" else 0)
    return (machine if count == 1 else _of_several(machine, count, arguments.link, notes)), notes


def _of_several(machine: Machine, count: int, gigabits: float, notes: list[str]) -> Machine:
    """These ranks on several machines. gigabits: a second, that each sends to the others."""
    each, byte = machine.ranks // count, 8e-9 / gigabits
    notes.append(
        f"machines: {count} with {each} card(s) each; one card can use all of the {gigabits:g} Gbit/s, and "
        f"{1e6 * FIRST_BYTE:.0f} us until the first byte arrives are assumed"
    )
    hosts = tuple(rank // each for rank in range(machine.ranks))
    return replace(machine, hosts=hosts, link=MachineLink(byte, byte, FIRST_BYTE, "given"))


def found_kind() -> str:
    """The kind of this host's devices, found without starting a driver of NPUs."""
    return next(kind for kind in ("npu", "cuda", "cpu") if devices.count_visible(kind))


def found_card(kind: str) -> str:
    """The name of this host's cards among those with published figures; the most common of its kind if unknown."""
    if kind == "npu":
        line = host.npu_line()
        return line if line in CARD_FIGURES else "a2"
    if kind == "cuda":
        import torch

        return gpu_named(torch.cuda.get_device_name(0))
    return "cpu"


def _host_memory(arguments: Namespace, ranks: int, here: bool, notes: list[str]) -> int:
    if arguments.host_memory is not None:
        return int(arguments.host_memory * 1e9)
    if here:
        notes.append(f"host memory: what this host has available, without {memory.ROOM / 1e9:.0f} GB that stay free")
        return max(0, memory.available() - memory.ROOM)
    notes.append("host memory: 128 GB for each card is assumed (--host-memory)")
    return int(ranks * HOST_MEMORY_PER_CARD)


def _device_memory(arguments: Namespace, kind: str, card: str, ranks: int, on_host: int, notes: list[str]) -> int:
    if arguments.device_memory is not None:
        return int(arguments.device_memory * 1e9)
    if kind == "cpu":
        return on_host // ranks
    published = CARD_FIGURES[card].memory
    notes.append(f"memory of a card: {USABLE:.0%} of the published {published / 1e9:.0f} GB (--device-memory)")
    return int(USABLE * published)
