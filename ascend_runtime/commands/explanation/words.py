"""A record in words, one line for each fact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoints.faults import printable
from ...specs.plans import AXES
from ...specs.record import DECODE, DENOISE, JobRecord, VideoRecord
from ..queue import workflow
from .host import Deviation, Verdict
from .metadata import Metadata

NAMES_WIDTH = 12  # of the names
MAX_SHOWN = 2000  # characters of a prompt
SHOWN_SETTINGS = (
    "solver", "schedule", "shift", "guidance", "low-noise guidance", "embedded guidance", "boundary", "batch",
)  # fmt: skip
VERDICTS = {
    Verdict.BITS: "this host would make the same video, bit for bit",
    Verdict.ROUNDING: "this host would make the same video, within rounding, because of",
    Verdict.UNKNOWN: "whether this host would make the same video cannot be known, because of",
    Verdict.ANOTHER: "this host would make another video, or none, because of",
}


def lines(metadata: Metadata, found: list[Deviation], verdict: Verdict, notes: list[str]) -> Iterator[str]:
    """The explanation, escaped, as a file may hold anything."""
    facts = [*_facts(metadata.record), *_texts(metadata.graph)]
    yield from (printable(f"{name.ljust(NAMES_WIDTH)} {text}") for name, text in facts if text)
    decisive = [reason for reason in found if reason.verdict is verdict]
    yield VERDICTS[verdict] + (":" if decisive else "")
    yield from (f"  {printable(reason.text)}" for reason in decisive)
    others = [reason for reason in found if reason.verdict is not verdict]
    if others:
        yield "it also differs in:"
        yield from (f"  {printable(reason.text)}" for reason in others)
    yield from map(printable, notes)


def texts_of(graph: Mapping[str, dict]) -> dict[str, Any]:
    """The prompt, negative prompt and seed of a graph; None where there is none."""
    searches = {"prompt": workflow.PROMPT, "negative": workflow.NEGATIVE, "seed": workflow.SEED}
    return {name: workflow.get(dict(graph), workflow.find(dict(graph), search)) for name, search in searches.items()}


def _texts(graph: Mapping[str, dict]) -> Iterator[tuple[str, str]]:
    texts = texts_of(graph)
    for name in ("prompt", "negative"):
        if isinstance(texts[name], str):
            yield name, texts[name][:MAX_SHOWN] + "..." * (len(texts[name]) > MAX_SHOWN)
    yield "graph's seed", "" if texts["seed"] is None else str(texts["seed"])


def _facts(record: VideoRecord) -> Iterator[tuple[str, str]]:
    jobs = record.jobs
    parts = {part.digest: part for job in jobs for part in job.parts}.values()
    for part in parts:
        yield part.part, f"{part.name}, digest {part.digest}"
    for job in jobs:
        if job.kind == DENOISE:
            yield from _of_denoising(job)
    sizes = [job.size for job in jobs if job.kind == DECODE and len(job.size) == 3]
    for frames, height, width in sizes[-1:]:
        yield "video", f"{frames} frames of {width} x {height}"
    for host in dict.fromkeys(job.host for job in jobs):
        threads = "" if host.threads is None else f", {host.threads} threads each"
        yield "made on", f"{host.ranks} rank(s), {host.device} {host.card}{threads}"
    yield "seconds", _listed({stage: f"{taken:.2f}" for stage, taken in _seconds(jobs).items()})
    yield "versions", _listed(record.versions)


def _of_denoising(job: JobRecord) -> Iterator[tuple[str, str]]:
    for lora in job.loras:
        digest = "unknown" if lora.file is None else lora.file.digest
        form = f"{lora.form}, " if lora.form else ""
        yield "LoRA", f"{form}strength {lora.strength:g}, expert {lora.expert}, digest {digest}"
    settings = {name: job.settings[name] for name in SHOWN_SETTINGS if name in job.settings}
    seed = f"seed {job.settings['seed']}, " if "seed" in job.settings else ""
    steps = job.settings.get("steps", "?")
    calls = f" ({job.calls} model calls of a sampler outside of the ranks)" if job.calls else ""
    yield "sampling", f"{seed}{steps} steps{calls}" + "".join(f", {name} {value}" for name, value in settings.items())
    degrees = " x ".join(str(job.plan.get(f"{axis}_degree", "?")) for axis in AXES)
    rest = {name: value for name, value in job.plan.items() if not name.endswith("_degree")}
    yield "plan", f"{' x '.join(AXES)} = {degrees}, {_listed(rest)}"
    yield "predicted", job.predicted
    for kind, own in job.accelerators.items():
        yield "accelerator", f"{kind.replace('_', ' ')}: {_listed(own)}"
    yield "saved", _listed(job.saved)
    yield "weights", f"{job.dtype}, quantization {job.settings.get('quantization', 'none')}"
    yield "operators", _listed(job.operators)


def _seconds(jobs: list[JobRecord]) -> Counter:
    """By stage, of all jobs."""
    total: Counter = Counter()
    for job in jobs:
        total.update(job.seconds)
    return total


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
