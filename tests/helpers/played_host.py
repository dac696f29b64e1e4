"""Hosts that are played: folders in place of /dev, /proc, /sys, scripts in place of tools, metadata of packages.

Each is healthy as it is made; a test then plants a fault.
"""

import json
import os
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
from ascend_runtime.commands.doctor import command
from ascend_runtime.commands.doctor.findings import OK
from ascend_runtime.commands.doctor.surroundings import PACK_FOLDER, Space, Surroundings
from ascend_runtime.hardware import host
from ascend_runtime.wire import tls

GB = 10**9
PACKAGES = {
    "torch": "2.13.0", "transformers": "4.57.1", "diffusers": "0.39.0", "safetensors": "0.6.2", "sentencepiece": "0.2",
    "ftfy": "6.3.1", "gguf": "0.19.0", "msgspec": "0.19.0", "pillow": "11.3.0", "tqdm": "4.67", "psutil": "7.0.0",
    "requests": "2.32.4", "websocket-client": "1.8.0",
}  # fmt: skip
RULE = "+---------------------------+---------------+----------------------------------------------------+"
PCI = {"a2": "0xd802", "a3": "0xd803", "310P": "0xd500"}


class PlayedHost:
    """kind: "npu", "cuda" or "cpu". line: of NPUs, "a2" (8 cards) or "a3" (8 cards of 2 dies)."""

    def __init__(self, folder: Path, kind: str, line: str = "a2"):
        self.root, self.kind, self.line = folder, kind, line
        self.bin, self.site, self.dev, self.proc = (folder / name for name in ("bin", "site", "dev", "proc"))
        self.cann, self.comfyui = folder / "cann", folder / "comfyui"
        self.libraries = set(host.LIBRARIES)
        self.affinity, self.space, self.seconds = 64, Space(500 * GB, 400 * GB), 0.0
        self.limits, self.version, self.time = {}, (3, 11), 0.0
        self.fails_to_bind = 0  # errno
        self.leads_to = "192.168.10.1"  # where the address of a cluster does
        self.environ = {"PATH": str(self.bin), "HOME": str(folder), "COMFYUI_DIR": str(self.comfyui)}
        self._kernel()
        self._python()
        self._comfyui()
        {"npu": self._npus, "cuda": self._gpus, "cpu": lambda: None}[kind]()

    # The parts of a healthy host

    def _kernel(self):
        self.write("proc/meminfo", f"MemTotal: {10**9} kB\nMemFree: {8 * 10**8} kB\nMemAvailable: {8 * 10**8} kB\n"
                   "Buffers: 0 kB\nCached: 0 kB\nActive: 0 kB\nInactive: 0 kB\nShmem: 0 kB\nSlab: 0 kB\n")  # fmt: skip
        self.write("proc/cpuinfo", "flags\t: fpu avx512_bf16\nflags\t: fpu avx512_bf16\n")
        self.write("proc/self/cgroup", "0::/\n")
        self.write("proc/self/mountinfo", f"30 23 0:26 / {self.root}/cgroup rw - cgroup2 cgroup2 rw\n")
        self.write("cgroup/.keep", "")
        head = "  sl  local_address rem_address   st\n"
        for name in ("tcp", "tcp6"):
            self.write(f"proc/net/{name}", head)
        self.interface("lo", up=True, state="unknown")
        self.interface("eth0", up=True)
        self.write("dev/shm/.keep", "")

    def _python(self):
        self.site.mkdir(parents=True)
        for name, version in PACKAGES.items():
            self.package(name, version)
        self.script("python", "echo {}")

    def _comfyui(self):
        self.write("comfyui/main.py", "")
        self.write("comfyui/comfy/.keep", "")
        self.write("comfyui/output/.keep", "")
        self.write("comfyui/comfyui_version.py", '__version__ = "0.3.75"\n')
        self.model = self.comfyui / "models" / "vae" / "vae.safetensors"
        self.safetensors(self.model)

    def _npus(self):
        chips = 8 if self.line == "a2" else 16
        for name in [*(f"davinci{n}" for n in range(chips)), "davinci_manager"]:
            self.write(f"dev/{name}", "")
        for place in range(chips):
            self.write(f"sys/bus/pci/devices/0000:{place:02x}:00.0/vendor", "0x19e5\n")
            self.write(f"sys/bus/pci/devices/0000:{place:02x}:00.0/device", f"{PCI[self.line]}\n")
        self.package("torch_npu", "2.13.0")
        self.write("site/torch_npu/__init__.py", "")
        self.environ["ASCEND_HOME_PATH"] = str(self.cann)
        self.environ["PYTHONPATH"] = f"{self.cann}/python/site-packages"
        self.environ["LD_LIBRARY_PATH"] = f"{self.cann}/lib64"
        self.write("cann/lib64/libascendcl.so", "")
        for part in ("toolkit", "ops"):
            self.write(f"cann/x86_64-linux/ascend_{part}_install.info", "package_name=x\nversion=9.1.0\narch=x86_64\n")
        self.npu_smi()

    def _gpus(self):
        for number in range(8):
            self.write(f"dev/nvidia{number}", "")
        self.nvidia_smi()

    # What tests change

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def script(self, name, body):
        self.bin.mkdir(parents=True, exist_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def prints(self, name, text):
        """A tool that prints a text, without any other tool, as PATH has none."""
        file = self.write(f"{name}.txt", text)
        self.script(name, f'while IFS= read -r line || [ -n "$line" ]; do printf "%s\\n" "$line"; done < "{file}"')

    def package(self, name, version, files={}):
        self.remove_package(name)
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        self.write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.write(info / "RECORD", "".join(f"{file},{digest},\n" for file, digest in files.items()))

    def remove_package(self, name):
        for info in self.site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            info.rename(info.with_name(f"removed-{info.name}.txt"))

    def interface(self, name, up, state="up"):
        self.write(f"sys/class/net/{name}/flags", "0x1003\n" if up else "0x1002\n")
        self.write(f"sys/class/net/{name}/operstate", f"{state}\n")

    def port(self, number, state="0A", name="tcp"):
        file = self.proc / "net" / name
        file.write_text(f"{file.read_text()}   0: 0100007F:{number:04X} 00000000:0000 {state} 00000000:00000000\n")

    def process(self, pid, parent, state="S", program="python3", command="", variables=""):
        fields = [state, str(parent), *"0" * 17, "100", "0", "5000", *"0" * 20]
        self.write(f"proc/{pid}/stat", f"{pid} ({program}) {' '.join(fields)}\n")
        self.write(f"proc/{pid}/cmdline", command.replace(" ", "\0"))
        self.write(f"proc/{pid}/environ", variables)

    def safetensors(self, path, size=64):
        header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        return path

    def npu_smi(self, health={}, used={}, holders=()):
        """As npu-smi 24.1 and 25.5 print it. health: card -> word. used: chip -> MB. holders: (card, chip, pid, MB)."""
        chips = 1 if self.line == "a2" else 2
        name, device = ("910B3", "     ") if self.line == "a2" else ("Ascend910", "{:5d}")
        lines = [RULE, "| npu-smi 25.5.2                   Version: 25.5.2                          |", RULE,
                 "| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|",
                 "| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |"]
        for card in range(8):
            lines.append(RULE.replace("-", "="))
            for chip in range(chips):
                number = card * chips + chip
                word, held = health.get(card, "OK"), used.get(number, 3412)
                lines += [
                    f"| {card:<5} {name:<20}| {word:<14}| 91.0        36                0    / 0             |",
                    f"| {chip:<5} {device.format(number):<20}| 0000:{number:02X}:00.0  | 0           0    / 0       "
                    f"   {held:<5}/ 65536         |",
                ]  # fmt: skip
        lines += [RULE, "| NPU     Chip              | Process id    | Process name             | Memory(MB) |"]
        for card in range(8):
            own = [holder for holder in holders if holder[0] == card]
            rows = [f"| {card:<7} {chip:<18}| {pid:<14}| python3                  | {held:<24}|"
                    for _, chip, pid, held in own]  # fmt: skip
            lines += rows or [f"| No running processes found in NPU {card}      |"]
        self.prints("npu-smi", "\n".join([*lines, RULE, ""]))

    def nvidia_smi(self, ecc="0", used=4, apps=""):
        rows = "".join(f"{n}, GPU-{n}, NVIDIA H100 80GB HBM3, 81559, {used}, {ecc}\n" for n in range(8))
        gpus, own = self.write("gpus.txt", rows), self.write("apps.txt", apps)
        show = 'while IFS= read -r line; do printf "%s\\n" "$line"; done <'
        self.script("nvidia-smi", f'case "$1" in --query-gpu*) {show} "{gpus}";; *) {show} "{own}";; esac')

    def cluster(self, listen="192.168.10.1:29600"):
        """A cluster of two machines; returns its key file."""
        folder = self.root / ".config" / "ascend-video" / "clusters"
        self.write(folder / "atlas.json", json.dumps({"listen": listen, "key": "atlas.key", "ranks": 16}))
        tls.make_key(folder / "atlas.key", "atlas")
        return folder / "atlas.key"

    # The doctor on it

    def around(self, **changes) -> Surroundings:
        return replace(
            Surroundings(self.kind), environ=self.environ, root=self.root, python=str(self.bin / "python"),
            version=self.version, pack=PACK_FOLDER, folder=self.root, size_of=lambda path: self.space,
            limit=lambda which: self.limits.get(which), clock=self.clock, bind=self.bind, **changes,
        )  # fmt: skip

    def bind(self, host, port):
        if self.fails_to_bind:
            raise OSError(self.fails_to_bind, os.strerror(self.fails_to_bind))
        return self.leads_to

    def clock(self):
        self.time += self.seconds
        return self.time

    @contextmanager
    def played(self, monkeypatch):
        """This process sees the packages, the libraries and the cores of the played host."""

        def load(name):
            if name not in self.libraries:
                raise OSError(f"{name}: cannot open shared object file")

        with monkeypatch.context() as patch:
            patch.setattr(host, "DEVICE_FILES", self.dev)
            patch.setattr(host, "PCI_DEVICES", self.root / "sys/bus/pci/devices")
            patch.setattr(host.ctypes, "CDLL", load)
            patch.setattr(os, "sched_getaffinity", lambda pid: set(range(self.affinity)))
            patch.setattr(psutil, "PROCFS_PATH", str(self.proc))
            patch.setattr(sys, "path", [str(self.site), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")])
            yield

    def examine(self, monkeypatch, **changes):
        """All that is not OK."""
        with self.played(monkeypatch):
            groups = command.examine(self.around(**changes))
        return [finding for findings in groups.values() for finding in findings if finding.level != OK]
