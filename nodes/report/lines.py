"""The lines of a report: how the ranks shared the work, what took how long, what was saved, memory, warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from comfy_execution.utils import get_executing_context

from ...ascend_runtime.acceleration.report import names_of
from ...ascend_runtime.specs.acceleration import UNKNOWN
from ...ascend_runtime.specs.record import DECODE, DENOISE, ENCODE, ENCODE_VIDEO, JobRecord
from ..metadata import kept
from .words import Say, duration, gigabytes, output

# (kind of a job, its stage) -> the text for its seconds. "load" is that of all kinds
STAGES = {(ENCODE, "encode"): "text", (ENCODE_VIDEO, "encode"): "image", (DENOISE, "warm up"): "warm-up",
          (DENOISE, "denoise"): "sampling", (DECODE, "decode"): "decoding"}  # fmt: skip
LEAST = 0.05  # seconds of a stage that is worth a word


def of_sampling(info: dict[str, Any], record: JobRecord | None) -> dict:
    """The output of a sampler's node. info, record: of the job's `client.Result`."""
    lines = [] if record is None else [
        *_plan(record), *_machines(info), _settings(record, info), _took(record, _before(record), info)
    ]  # fmt: skip
    return output([*lines, *_solver(info), *_saved(info), *_memory(info), *_warnings(info)])


def of_decoding(info: dict[str, Any], record: JobRecord | None) -> dict:
    """The output of a decoding node: the seconds of the whole video, as far as it was made in this run."""
    lines = [] if record is None else [_whole([*_before(record), record])]
    return output([*lines, *_warnings(info)])


def of_warnings(info: dict[str, Any]) -> dict:
    """The output of a node that has only warnings to show, if any."""
    return output(_warnings(info))


def of_no_step(start: int, end: int, total: int) -> dict:
    """The output of a sampler that has no step to compute."""
    return output([Say("no step", {"start": start, "end": end, "steps": total})])


def _before(own: JobRecord) -> list[JobRecord]:
    """The jobs of this run that the node's inputs come from."""
    context = get_executing_context()
    return [] if context is None else [one for one in kept.before(context, this_run=True) if one is not own]


def _plan(record: JobRecord) -> list[Say]:
    """How the ranks share a step, and where the weights are if not on each."""
    ranks, on = record.host.ranks, "process" if record.host.device == "cpu" else "card"
    cfg, tp = (record.plan.get(f"{axis}_degree", 1) for axis in ("cfg", "tp"))
    sequence = record.plan.get("ring_degree", 1) * record.plan.get("ulysses_degree", 1)
    if ranks == 1:
        lines = [Say(f"one {on}")]
    else:
        parts = []
        if cfg > 1:
            parts.append(Say(f"prompts of two {on}" if ranks == cfg else f"prompts of halves {on}"))
        if sequence > 1:
            parts.append(Say("video in halves" if cfg > 1 else "video", {"parts": sequence}))
        if tp > 1:
            parts.append(Say("layers", {"parts": tp}))
        lines = [Say(f"many {on}", {"ranks": ranks, "parts": tuple(parts)})]
    lines += [Say(f"spread weights {on}")] * bool(record.plan.get("fsdp") and ranks > tp)
    return lines + [Say(f"experts in turns {on}")] * (record.settings.get("experts") == "swap")


def _machines(info: dict[str, Any]) -> list[Say]:
    """Of a cluster. A record has no names of hosts, as it goes into files that are shared."""
    names = info.get("machines", [])
    return [Say("machines", {"names": list(names)})] if names else []


def _settings(record: JobRecord, info: dict[str, Any]) -> Say:
    """The settings that were used, also where a widget leaves them to the model."""
    scales = {"cfg": "guidance", "cfg of the low-noise expert": "low-noise guidance",
              "embedded guidance": "embedded guidance"}  # fmt: skip
    values = [Say(key, {"scale": f"{info[name]:g}"}) for key, name in scales.items() if name in info]
    values += [Say("shift", {"shift": f"{info['shift']:g}"})] if "shift" in info else []
    values += [record.settings["solver"]] if "solver" in record.settings else []
    if "distilled" in info:
        return Say("settings of", {"name": info["distilled"], "values": values})
    return Say("settings", {"values": values})


def _took(own: JobRecord, before: Sequence[JobRecord], info: dict[str, Any]) -> Say:
    """The seconds of each stage so far, and of a step."""
    seconds = _by_stage([*before, own])
    sampling = own.seconds.get("denoise", 0.0)
    earlier = {"sampling": "earlier steps"}
    seconds["sampling"] -= sampling
    parts = [Say(earlier.get(name, name), {"time": duration(taken)})
             for name, taken in seconds.items() if taken >= LEAST]  # fmt: skip
    steps, first, end = info["steps"], info.get("first step", 0), info.get("end step", info["steps"])
    done = {"steps": steps, "first": first + 1, "last": end, "time": duration(sampling),
            "step": duration(_of_a_step(info, sampling, end - first))}  # fmt: skip
    predicted = info.get("plan", {}).get("predicted", {}).get("denoise")
    key = "steps" if end - first == steps else "some steps"
    if predicted is not None:
        key, done = f"{key}, predicted", done | {"predicted": duration(predicted)}
    return Say("took", {"time": duration(sum(seconds.values()) + sampling), "stages": [*parts, Say(key, done)]})


def _of_a_step(info: dict[str, Any], sampling: float, steps: int) -> float:
    facts = info.get("acceleration")
    return sampling / steps if facts is None else mean(facts["seconds_a_step"])


def _whole(records: Sequence[JobRecord]) -> Say:
    seconds = _by_stage(records)
    parts = [Say(name, {"time": duration(taken)}) for name, taken in seconds.items() if taken >= LEAST]
    time = duration(sum(seconds.values()))
    return Say("whole", {"time": time, "stages": parts}) if parts else Say("took at once", {"time": time})


def _by_stage(records: Sequence[JobRecord]) -> Counter[str]:
    """Seconds by the text for a stage, in the order in which a video goes through them."""
    found = Counter({name: 0.0 for name in ("loading", *STAGES.values())})
    for record in records:
        for stage, seconds in record.seconds.items():
            found[STAGES.get((record.kind, stage), "loading")] += seconds
    return found


def _solver(info: dict[str, Any]) -> list[Say]:
    return [Say("solver", {"step": info["first step"] + 1})] if info.get("history") == "missing" else []


def _saved(info: dict[str, Any]) -> Iterator[Say]:
    """What accelerators left out, and what that saved."""
    facts = info.get("acceleration")
    if facts is None:
        return
    names, steps, what = names_of(facts), len(facts["seconds_a_step"]), []
    if list(facts["accelerators"]) != ["rainfusion"]:
        what.append(Say("reused", {"count": len(facts["steps_reusing"]), "steps": steps}))
    if "rainfusion" in facts["accelerators"]:
        what.append(Say("sparse", {"percent": f"{100 - 100 * facts['mean_density']:.0f}"}))
    if not facts["flops_saved"]:
        yield Say("nothing saved", {"names": names, "what": what})
    else:
        measured, took = facts["seen_speed_up"], sum(facts["seconds_a_step"])
        times = {"times": f"{measured or facts['predicted_speed_up']:.2f}"}
        if measured is not None and measured > 1:
            times |= {"time": duration(took * (measured - 1))}
        key = "saved, computed" if measured is None else "saved" if measured > 1 else "saved, no faster"
        yield Say(key, {"names": names, "what": what, "percent": f"{100 * facts['flops_saved']:.0f}"} | times)
    if UNKNOWN in facts.get("calibration", {}).values():
        yield Say("not calibrated", {"names": names})


def _memory(info: dict[str, Any]) -> list[Say]:
    """The fullest card's. A CPU's ranks share the host's memory, which nobody measures for a job."""
    peak, free = info.get("peak bytes"), info.get("plan", {}).get("device_free")
    if peak is None:
        return []
    return [Say("memory of", {"peak": gigabytes(peak), "free": gigabytes(free)}) if free else
            Say("memory", {"peak": gigabytes(peak)})]  # fmt: skip


def _warnings(info: dict[str, Any]) -> list[Say]:
    """They come from the ranks, in English."""
    return [Say("warning", {"text": text}) for text in info.get("warnings", ())]
