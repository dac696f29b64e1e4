"""The result of the command as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...planner.choice import Choice, excess
from ...planner.choosing import words
from ...planner.facts import Machine, Model, Prediction, Video
from ...specs import VideoSize
from ...specs.plans import AXES

TABLE_FORMAT = 1  # of the JSON; a change of a field's meaning raises it
STAGES = ("load", "encode", "denoise", "decode")
SETTINGS_SHOWN = ("fsdp", "experts", "encoder", "tiles")
SENT, LINK = "GB sent: by a rank in a step", "GB link: by a machine to others in a step"
FIGURES = (*(f"{stage} s" for stage in STAGES), "GB/card", "GB host", "GB sent")
NUMBERS = (*FIGURES, "GB link")
CHOSEN = "->"


def table(choice: Choice, machine: Machine) -> str:
    """Columns whose cells are all the same are a line below the table."""
    rows = [_cells(one, choice, machine) for one in (*choice.fitting, *choice.others)]
    alike = [name for name in rows[0] if name in SETTINGS_SHOWN and len({row[name] for row in rows}) == 1]
    shown = [name for name in rows[0] if name not in alike]
    lines = [shown, *([row[name] for name in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = (
        "  ".join(f"{cell:>{width}}" if name in NUMBERS else f"{cell:{width}}"
                  for name, cell, width in zip(shown, line, widths)).rstrip()
        for line in lines
    )  # fmt: skip
    same = ", ".join(f"{name} {rows[0][name]}" for name in alike)
    return "\n".join([*aligned, *([f"in all: {same}"] if same else []), SENT, *([LINK] if machine.link else [])])


def _cells(one: Prediction, choice: Choice, machine: Machine) -> dict[str, str]:
    made, fits = one.arrangement, excess(one.memory, machine) <= 1
    figures = [
        *(f"{one.seconds.get(stage, 0.0):.1f}" for stage in STAGES),
        f"{one.memory.device_peak / 1e9:.1f}",
        f"{one.memory.host_total / 1e9:.1f}",
        f"{sum(one.sent.values()) / 1e9:.2f}",
    ]
    return {
        "": CHOSEN if choice.fitting and one is choice.chosen else "",
        "plan": words.degrees(made.plan),
        "fsdp": "yes" if made.fsdp else "no",
        "experts": made.experts,
        "encoder": made.encoder,
        "tiles": made.tiles,
        **dict(zip(FIGURES, figures)),
        **({"GB link": f"{one.between.sent / 1e9:.2f}"} if machine.link else {}),
        "fits": "yes" if fits else f"no: {why_not(one, machine)}",
    }


def why_not(one: Prediction, machine: Machine) -> str:
    """What is short, and by how much."""
    short = []
    if (over := one.memory.device_peak - machine.device_memory) > 0:
        short.append(f"{words.gigabytes(over)} of a card to {words.peak_stage(one.memory)}")
    if (over := one.memory.host_total - machine.host_memory) > 0:
        short.append(f"{words.gigabytes(over)} of the host")
    return " and ".join(short) or "the ranks and the host share their memory"


def facts(
    model: Model, video: Video, machine: Machine, choice: Choice, refused: str | None,
    nearest: Sequence[VideoSize | None],
) -> dict[str, Any]:  # fmt: skip
    """For JSON. nearest: what fits if nothing does: with fewer frames, and with a smaller picture."""
    plans = [_facts(one, fits) for fits, group in ((True, choice.fitting), (False, choice.others)) for one in group]
    return {
        "format": TABLE_FORMAT,
        "model": {"name": model.defaults.name, "family": model.family.name, "experts": len(model.experts),
                  "dtype": model.dtype, "bytes_on_disk": plans[0]["read"] if plans else None},
        "video": {"latent": list(video.shape), "steps": video.steps, "guided": video.guided,
                  "steps_of_experts": [sum(expert == one for expert, _ in video.passes)
                                       for one in range(len(model.experts))]},
        "machine": asdict(machine),
        "rates": choice.rates,
        "plans": plans,
        "chosen": 0 if choice.fitting else None,
        "line": choice.line if choice.fitting else None,
        "refused": refused,
        "nearest": [{"width": one.width, "height": one.height, "frames": one.num_frames} for one in nearest if one],
    }  # fmt: skip


def _facts(one: Prediction, fits: bool) -> dict[str, Any]:
    made = one.arrangement
    return {
        "degrees": dict(zip(AXES, made.plan.degrees)),
        "fsdp": made.fsdp,
        "experts": made.experts,
        "encoder": made.encoder,
        "tiles": made.tiles,
        "seconds": {stage: round(one.seconds.get(stage, 0.0), 3) for stage in STAGES},
        "device_bytes": {stage: dict(parts) for stage, parts in one.memory.device.items()},
        "device_peak": one.memory.device_peak,
        "host_bytes": dict(one.memory.host),
        "host_total": one.memory.host_total,
        "sent": dict(one.sent),
        "between": one.between._asdict(),
        "read": one.read,
        "fits": fits,
    }
