"""Predicts a job under each plan, and prints which one is chosen."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ...checkpoints.faults import printable, printable_lines
from ...planner import choice, models, rates, videos
from ...planner.facts import Machine, Model
from ...planner.rates import Rates
from ...planner.timing.profile import rates_for
from ...specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from .. import video_options
from ..progress import ProgressDisplay
from .machines import machine_of
from .options import STORED, fixed_of
from .table import facts, table


def run(arguments: Namespace, progress: ProgressDisplay) -> int:
    """Returns 0 if a plan fits."""
    progress.begin("reading headers")
    machine, notes = machine_of(arguments)
    model, missing = model_and_notes(arguments, machine.kind)
    own = model.defaults.size
    size = video_options.size_of(arguments, own, model.family.form(model.experts[0].config).multiple)
    sample = video_options.sampling_of(arguments, seed=0)
    video = videos.video_of(model, size, sample, from_image=arguments.image)
    if arguments.measure:
        _measure(arguments, model, machine, progress)
    progress.begin("predicting")
    fixed = fixed_of(arguments)
    known = _rates(arguments, model, machine)
    made = choice.choice_of(model, video, machine, known, fixed)
    refused, nearest = None, ()
    if not made.fitting:
        refused = str(choice.refusal(model, video, machine, fixed, made.others))
        nearest = choice.nearest_sizes(model, video, machine, fixed)
    progress.end()
    if arguments.json:
        print(json.dumps(facts(model, video, machine, made, refused, nearest), indent=1))
        return 0 if made.fitting else 1
    spec = model.defaults.fill(sample, size.width * size.height)
    print(printable(f"{model.defaults.name}: {video_options.summary(size, spec)}"))
    print(*map(printable, [*missing, *notes]), "", printable_lines(table(made, machine)), "", sep="\n")
    if refused is None:
        print(printable(f"chosen: {made.line}"))
        if warning := choice.crossing_warning(made.chosen, model, video, machine, known, fixed):
            print(printable(f"warning: {warning}"))
        return 0
    progress.say(f"error: {refused}")
    return 1


def _rates(arguments: Namespace, model: Model, machine: Machine) -> Rates:
    """Those that were measured next to the model, else the card's published ones."""
    if models.is_published(arguments.model):
        return rates.of_card(machine.card)
    return rates_for(arguments.model, machine.kind, machine.card, model.family.name, machine.host_ranks)


def _measure(arguments: Namespace, model: Model, machine: Machine, progress: ProgressDisplay) -> None:
    """Writes the profile of this host next to the model."""
    from ..measuring.measure import Subject, measure

    progress.end()
    vae = _vae_path(arguments)
    subject = Subject(model, arguments.model, None if vae is None else VaeSpec(path=vae), machine.kind)
    measure(subject, sorted({1, machine.ranks}), machine.card, report=progress.say)


def model_and_notes(arguments: Namespace, kind: str) -> tuple[Model, list[str]]:
    """The model, and a note about parts that MODEL lacks, which are taken from the published model."""
    if models.is_published(arguments.model):
        return models.published(arguments.model, kind, arguments.quantization, STORED[arguments.stored]), []
    spec = DiffusionModelSpec(path=arguments.model, low_noise_path=arguments.low_noise, dtype=arguments.dtype,
                              quantization=arguments.quantization)  # fmt: skip
    is_folder = Path(arguments.model).is_dir()
    encoder = arguments.text_encoder or (arguments.model if is_folder else None)
    vae = _vae_path(arguments)
    read = models.read(
        spec,
        None if encoder is None else TextEncoderSpec(
            path=encoder, path_2=arguments.text_encoder_2, tokenizer_path=arguments.tokenizer,
            tokenizer_path_2=arguments.tokenizer_2,
        ),
        None if vae is None else VaeSpec(path=vae),
        kind,
    )  # fmt: skip
    return models.completed(read, kind)


def _vae_path(arguments: Namespace) -> str | None:
    return arguments.vae or (arguments.model if Path(arguments.model).is_dir() else None)
