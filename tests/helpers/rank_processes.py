"""The ranks of a process, and the memory they share with it, as /proc shows them: also after that process is gone."""

import time
from pathlib import Path


def ranks_of(parent: int) -> dict[int, int]:
    """Process ids by rank of the ranks that the process `parent` started. Its end does not hide them."""
    return processes_with("ASCEND_RUNTIME_PARENT", str(parent))


def processes_with(variable: str, value: str) -> dict[int | None, int]:
    """Process ids by rank, None for what is no rank, of the processes whose environment has this variable."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        environment = environment_of(int(process.name))
        if environment.get(variable) == value:
            found[int(environment["RANK"]) if "RANK" in environment else None] = int(process.name)
    return found


def environment_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with; none of one that has ended, or is not ours."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def waits(pid: int) -> bool:
    """Whether all threads of a process sleep: it neither computes nor wants to."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"S"}


def shared_memory(pids) -> set[int]:
    """Inodes of the runtime's memory files that these processes map or hold open."""
    return {inode for pid in pids for inode in _memory_files(Path("/proc") / str(pid))}


def holders(inodes: set[int]) -> set[int]:
    """Processes that keep any of these memory files from being freed."""
    return {int(process.name) for process in Path("/proc").glob("[0-9]*") if inodes & _memory_files(process)}


def seconds_until(condition, timeout: float) -> float:
    """How long it took until `condition()` was true. Raises AssertionError after `timeout` seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, f"not after {timeout} s"
        time.sleep(0.02)
    return time.monotonic() - began


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1000


def _memory_files(process: Path) -> set[int]:
    found = set()
    try:
        for line in (process / "maps").read_text().splitlines():
            if "/memfd:ascend-" in line:
                found.add(int(line.split()[4]))
        for descriptor in (process / "fd").iterdir():
            if str(descriptor.readlink()).startswith("/memfd:ascend-"):
                found.add(descriptor.stat().st_ino)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended meanwhile, or is not ours
    return found


def mapped_at(pid: int, address: int) -> tuple[str, int]:
    """What a process has mapped at an address: the name, and the inode."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, _, _, inode, *name = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return "".join(name), int(inode)
    raise AssertionError("nothing is mapped there")
