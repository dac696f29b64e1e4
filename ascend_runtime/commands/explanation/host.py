"""Whether this host would make the same video, and what decides about it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ...checkpoints.digest import file_digest
from ...checkpoints.paths import CALIBRATION
from ...hardware import cores, devices
from ...hardware.host import npu_line
from ...hardware.versions import versions
from ...recognition.calibration_file import calibration_digests, read_calibration
from ...specs.acceleration import CALIBRATED
from ...specs.record import DENOISE, ENCODE, FileDigest, HostRecord, JobRecord, PartRecord
from .metadata import Metadata

OWN_FOLDER = Path(__file__).absolute().parents[3]  # as it was found: ComfyUI's folder may hold a link to it
ASSETS = OWN_FOLDER / "assets"
CORE_TOKENIZER = ("text_encoders", "sd1_tokenizer")  # of core, in its package comfy
MAX_WALKED = 1_000_000  # files and folders
DECIDE_BY_NUMBERS = ("fbcache", "teacache", "magcache")
INPUTS = ("LoadImage", "LoadVideo", "LoadLatent")  # nodes that read what users put in ComfyUI's folder of inputs


class Verdict(IntEnum):
    """From the best to the worst."""

    BITS = 0
    ROUNDING = 1
    UNKNOWN = 2
    ANOTHER = 3


@dataclass(frozen=True)
class Deviation:
    """Why a host's video is not the same bits."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Host:
    """This host. device: the kind that "auto" takes. comfyui: its version; None if it was not found. seen: the digests
    of all files that have the size of one that is looked for."""

    device: str
    card: str
    folders: list[Path]
    comfyui: str | None
    seen: set[FileDigest]

    @classmethod
    def looked_at(cls, folders: list[Path], metadata: Metadata) -> Host:
        kind = devices.resolve_kind("auto")
        places = [*folders, *(found for one in folders for found in _next_to(one)), ASSETS]
        wanted = {file.size for job in metadata.record.jobs for file in _files(job)}
        numbers = filter(None, map(_comfyui, folders))
        return cls(kind, _card(kind), folders, next(numbers, None), set(_digests(places, wanted)))


def models_folders() -> list[Path]:
    """ComfyUI's folder of models, if the pack lies in its custom_nodes."""
    found = [pack.parent.parent / "models" for pack in (Path(os.environ.get("PWD", ".")), OWN_FOLDER)
             if pack.parent.name == "custom_nodes"]  # fmt: skip
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()][:1]


def reasons(metadata: Metadata, host: Host) -> list[Deviation]:
    """What keeps this host from making the same bits; empty if nothing does."""
    jobs = metadata.record.jobs
    found = [*_of_files(jobs, host), *_of_calibrations(jobs, host), *_of_what_is_not_recorded(jobs)]
    found += [*_of_versions(metadata.record.versions, host), *_of_devices(metadata, host)]
    return [*dict.fromkeys(found), *_of_decisions(jobs, found)]


def verdict_of(found: Iterable[Deviation]) -> Verdict:
    return max((reason.verdict for reason in found), default=Verdict.BITS)


def notes(metadata: Metadata) -> Iterator[str]:
    """What the verdict takes for granted."""
    nodes = [node for node in metadata.graph.values() if node["class_type"] in INPUTS]
    if files := sorted({value for node in nodes for value in node["inputs"].values() if isinstance(value, str)}):
        yield f"not compared, as the graph reads them as inputs: {', '.join(files)}"
    for job in metadata.record.jobs:
        degrees = [(name, job.plan.get(name)) for name in ("cfg_degree", "ulysses_degree")]
        if job.kind == DENOISE and job.host.ranks > 1 and not all(_fixes(metadata.graph, *one) for one in degrees):
            yield "the graph leaves the plan open: if another one is chosen here, the video is the same within rounding"
            return


def _files(job: JobRecord) -> Iterator[FileDigest]:
    yield from (file for part in job.parts for file in part.files)
    yield from (lora.file for lora in job.loras if lora.file is not None)


def _digests(folders: Iterable[Path], sizes: set[int]) -> Iterator[FileDigest]:
    """The digests of files of these sizes. Files that cannot be read are left out: they would make no video."""
    walked, visited = 0, set()
    for root in folders:
        for folder, inner, files in os.walk(root, followlinks=True):
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in visited:
                inner.clear()
                continue
            visited.add((state.st_dev, state.st_ino))
            walked += 1 + len(files)
            if walked > MAX_WALKED:
                raise ValueError(f"{root} has more than {MAX_WALKED:,} files. Give --models a folder of models.")
            for path in (Path(folder, name) for name in files):
                try:
                    if path.is_file() and path.stat().st_size in sizes:
                        yield file_digest(path)
                except OSError:
                    continue


def _next_to(models: Path) -> list[Path]:
    """Core's tokenizers, which text encoders use that have none in their files."""
    return [models.parent / "comfy" / name for name in CORE_TOKENIZER]


def _comfyui(models: Path) -> str | None:
    file = models.parent / "comfyui_version.py"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as opened:
        found = re.search(r'__version__ = "([\w.+-]{1,60})"', opened.read(10_000))
    return found and found[1]


def _of_files(jobs: list[JobRecord], host: Host) -> Iterator[Deviation]:
    for kind in (job.kind for job in jobs if not job.parts):
        yield Deviation(Verdict.UNKNOWN, f"{kind}: the model's files could not be read when the video was made")
    for part in {part.digest: part for job in jobs for part in job.parts}.values():
        if missing := [file for file in part.files if file not in host.seen]:
            largest = max(missing, key=lambda one: one.size)
            yield Deviation(Verdict.ANOTHER, f"{_named(part)}: {_missing(largest, host)}")
    for lora in {lora.file: lora for job in jobs for lora in job.loras}.values():
        if lora.file is None:
            yield Deviation(Verdict.UNKNOWN, "a LoRA: its file could not be read when the video was made")
        elif lora.file not in host.seen:
            yield Deviation(Verdict.ANOTHER, f"LoRA {lora.file.digest[:8]}: {_missing(lora.file, host)}")


def _named(part: PartRecord) -> str:
    return f"{part.name} ({part.part} {part.digest[:8]})"


def _missing(file: FileDigest, host: Host) -> str:
    where = ", ".join(map(str, host.folders)) or "the pack's own models; give --models"
    if any(file.size == one.size for one in host.seen):
        return f"the file of {file.size:,} bytes has other content in {where}"
    return f"there is no such file of {file.size:,} bytes in {where}"


def _of_calibrations(jobs: list[JobRecord], host: Host) -> Iterator[Deviation]:
    """Step caches read values from a file next to the model, if there is one."""
    used = [job.calibration for job in jobs if _method(job) in CALIBRATED]
    if not used:
        return
    own = [*_calibrations(host.folders)]
    for calibration in used:
        if calibration and calibration not in own:
            yield Deviation(Verdict.ANOTHER, "the step cache's calibration: this host has no such calibration")
        elif not calibration and own:
            yield Deviation(Verdict.UNKNOWN, "the step cache's calibration: the video was made without a file of it, "
                         "and this host has one")  # fmt: skip


def _calibrations(folders: Iterable[Path]) -> Iterator[dict[str, str]]:
    for file in (file for folder in folders for file in folder.rglob(f"*{CALIBRATION}")):
        model = file.name.removesuffix(CALIBRATION).removesuffix(".")
        with suppress(ValueError):  # a job would refuse it
            yield calibration_digests(read_calibration(str(file.with_name(model) if model else file.parent)))


def _method(job: JobRecord) -> object:
    return job.accelerators.get("step_cache", {}).get("method")


def _of_what_is_not_recorded(jobs: list[JobRecord]) -> Iterator[Deviation]:
    kinds = {job.kind for job in jobs}
    if DENOISE not in kinds:
        yield Deviation(Verdict.UNKNOWN, "no diffusion model: it did not run on the ranks, and nothing is known of it")
    elif ENCODE not in kinds:
        yield Deviation(Verdict.UNKNOWN, "no text encoder: it did not run on the ranks, and nothing is known of it")


def _of_versions(made: Mapping[str, str], host: Host) -> Iterator[Deviation]:
    here = versions() | ({} if host.comfyui is None else {"comfyui": host.comfyui})
    for name in sorted({*made, *here} - ({"comfyui"} if host.comfyui is None else set())):
        if made.get(name) != here.get(name):
            pair = f"{made.get(name, 'none')} made it, here is {here.get(name, 'none')}"
            yield Deviation(Verdict.ROUNDING, f"{name}: {pair}")


def _of_devices(metadata: Metadata, host: Host) -> Iterator[Deviation]:
    for made in dict.fromkeys(job.host for job in metadata.record.jobs):
        device = made.device if made.device == "cpu" and _fixes(metadata.graph, "device", "cpu") else host.device
        card = host.card if device == host.device else _card(device)
        if made.device != device:
            yield Deviation(Verdict.ROUNDING, f"device: {made.device} made it, here is {device}")
        elif made.card != card:
            yield Deviation(Verdict.ROUNDING, f"card: {made.card} made it, here is {card}")
        yield from _of_ranks(made, device, metadata.graph)
    for job in metadata.record.jobs:
        if job.operators.get("attention") == "fastest" and job.host.device == "npu":
            yield Deviation(Verdict.ROUNDING, "attention 'fastest': two runs may choose different operators")


def _fixes(graph: Mapping[str, dict], name: str, value: object) -> bool:
    """Whether a node of the graph sets an input to this value."""
    return any(node["inputs"].get(name) == value for node in graph.values())


def _card(kind: str) -> str:
    """As `devices.model_name`, without taking an NPU."""
    import torch

    return npu_line() or "unknown" if kind == "npu" else devices.model_name(torch.device(kind))


def _of_ranks(made: HostRecord, device: str, graph: Mapping[str, dict]) -> Iterator[Deviation]:
    """A CPU runs any number of ranks that the graph sets, and one without."""
    fixed = _fixes(graph, "ranks", made.ranks)
    ranks = devices.count_visible(device) if device != "cpu" else made.ranks if fixed else 1
    if ranks < made.ranks or ranks != made.ranks and not fixed:
        yield Deviation(Verdict.ROUNDING, f"ranks: {made.ranks} made it, here are {ranks}")
    elif made.threads is not None and device == "cpu":
        threads = int(cores.thread_variables(made.ranks, os.environ)[cores.THREADS_VARIABLE].split(",")[0])
        if threads != made.threads:
            yield Deviation(Verdict.ROUNDING, f"threads of a rank: {made.threads} made it, here are {threads}")


def _of_decisions(jobs: list[JobRecord], found: list[Deviation]) -> Iterator[Deviation]:
    """What rounding may change by more than rounding."""
    if verdict_of(found) is not Verdict.ROUNDING:
        return
    for method in sorted({str(_method(job)) for job in jobs} & {*DECIDE_BY_NUMBERS}):
        yield Deviation(Verdict.ROUNDING, f"{method} compares changes with a threshold, so that a step near it may be "
                     "skipped here and not there")  # fmt: skip
