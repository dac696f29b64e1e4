"""Summarizes a sampling job in one line: its steps, their time, and what accelerators saved."""

from __future__ import annotations

from statistics import mean
from typing import Any

from ..specs.acceleration import UNKNOWN

DISPLAY_NAMES = {"attention_cache": "AttentionCache", "block_cache": "block cache", "rainfusion": "RainFusion"}


def words_of(info: dict[str, Any], seconds: dict[str, float]) -> str:
    """The summary. info, seconds: fields of the job's `client.Result`."""
    facts = info.get("acceleration")
    if facts is None:
        return f"{info['steps']} steps, {_time(seconds['denoise'] / info['steps'])} a step; nothing skipped"
    parts = [f"{names_of(facts)}: {_saved(facts)}", f"{_time(mean(facts['seconds_a_step']))} a step"]
    if facts["flops_saved"]:
        parts.append(_speed_ups(facts))
    if UNKNOWN in facts.get("calibration", {}).values():
        parts.append("not calibrated for this model")
    return "; ".join(parts)


def names_of(facts: dict[str, Any]) -> str:
    """The names of a job's accelerators. facts: its `info["acceleration"]`."""
    return " and ".join(
        method if kind == "step_cache" else f"{DISPLAY_NAMES[kind]} {method}".strip()
        for kind, method in facts["accelerators"].items()
    )


def _saved(facts: dict[str, Any]) -> str:
    parts, accelerators = [], facts["accelerators"]
    if list(accelerators) != ["rainfusion"]:
        parts.append(f"{len(facts['steps_reusing'])} of {len(facts['seconds_a_step'])} steps reused")
    if "rainfusion" in accelerators:
        parts.append(f"attention {100 * facts['mean_density']:.0f} % dense")
    return ", ".join([*parts, f"{100 * facts['flops_saved']:.0f} % of the FLOPs saved"])


def _speed_ups(facts: dict[str, Any]) -> str:
    measured = facts["seen_speed_up"]
    predicted = f"{facts['predicted_speed_up']:.2f}x predicted"
    return f"{predicted}, no full step to compare" if measured is None else f"{predicted}, {measured:.2f}x measured"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds:.3f} s"
