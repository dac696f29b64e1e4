"""`python -m ascend_runtime inspect PATH`: shows what a model's folder or file contains, and whether it is complete."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.bounded import read_json
from ..checkpoints.codings.layouts import FP8_FORMATS
from ..checkpoints.faults import printable, printable_lines
from ..checkpoints.opening import open_tensors
from ..checkpoints.paths import existing
from ..components.checks import check_component
from ..components.model_config import check_experts
from ..errors import coded_error
from ..models.defaults import Defaults
from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE
from ..models.registry import families
from ..recognition.component import Component
from ..recognition.defaults import defaults_for
from ..recognition.few_bits import formats_of
from ..recognition.folders import (
    TRANSFORMERS,
    has_folder,
    has_low_noise,
    is_in_index,
    is_transformers_folder,
    loose_files,
    original_family,
    original_file,
)
from ..recognition.kinds import describe_other, is_kind, kinds
from ..recognition.layout import find_part, find_transformer
from ..recognition.lora.describing import describe
from ..specs import DiffusionModelSpec
from .progress import ProgressDisplay

LOW_NOISE_PART = "transformer_2"
PART_COLUMNS = ("part", "format", "files", "dtype", "size", "weights")


@dataclass(frozen=True)
class Found:
    """A part of a model. component: None if it is missing. fault: why it cannot be used; None if it can, or if it is
    missing but not required."""

    part: str
    component: Component | None
    fault: str | None


def run(arguments: argparse.Namespace, progress: ProgressDisplay | None = None) -> int:
    """Prints the parts of a model, or what a LoRA holds. Returns 0 if there are any and all can be used, as far as can
    be checked without reading weights."""
    progress = progress or ProgressDisplay()
    try:
        if (lora := describe(existing(arguments.path))) is not None:
            print(*map(printable, lora.lines), sep="\n")
            return 0 if lora.usable else 1
        found = list(inspect(arguments.path, progress.begin))
    except ValueError as error:
        progress.refuse(error)
        return 1
    progress.begin("sizes")
    rows = [PART_COLUMNS, *(_row(one, Path(arguments.path).expanduser()) for one in found)]
    progress.end()
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()))
    transformers = [one.component for one in found if one.part.startswith("transformer") and one.component]
    if transformers:
        print(*map(printable, _describe_defaults(arguments.path, transformers)), sep="\n")
    faults = [f"{one.part}: {one.fault}" for one in found if one.fault]
    print(*map(printable_lines, faults), sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


def inspect(path: str, on_part: Callable[[str], None] = lambda part: None) -> Iterator[Found]:
    """Yields the parts of a model in a folder or file, without reading weights. on_part: called before each part.

    Raises ValueError if the path does not exist, or contains no known part.
    """
    root = existing(path)
    if root.is_file():
        parts = list(dict.fromkeys(kind.name for kind in kinds() if is_kind(kind, root)))
        if not parts:
            known = ", ".join(kind.what for kind in kinds())
            raise coded_error("AV-1308", f"{root} contains none of these: {known}. {describe_other(root)}".strip())
    else:
        parts = _component(root) or _parts_of_a_model(path, root)
    experts: list[Component] = []
    found = []
    for part in parts:
        on_part(part)
        found.append(_inspect_part(part, path, experts))
    missing = [one for one in found if one.component is None]
    if len(missing) == len(found) and not any(_is_required(one.part, root) for one in missing):
        raise ValueError(missing[0].fault)
    for one in found:
        required = one.component is not None or _is_required(one.part, root)
        yield one if required else Found(one.part, None, None)


def _is_required(part: str, root: Path) -> bool:
    """Whether a part must exist: in a file, if it has a folder or an entry in the pipeline's index, or if the root is
    the original's folder of a complete model."""
    if root.is_file() or part == LOW_NOISE_PART or has_folder(root, part):
        return True
    if (root / "model_index.json").is_file():
        return is_in_index(root, part)
    return not is_transformers_folder(root) and bool(original_family(root) or loose_files(root))


def _component(root: Path) -> list[str]:
    """The part that the folder itself is, by its config.json; empty if it is a model's folder."""
    config = read_json(root / "config.json") if (root / "config.json").is_file() else {}
    named = [kind.name for kind in kinds() if kind.part.config_in(config) is not None]
    named += [kind.name for kind in kinds() if kind.name != TRANSFORMER and original_file(root, kind.name)]
    return list(dict.fromkeys(named))


def _parts_of_a_model(path: str, root: Path) -> list[str]:
    """The possible parts of a complete model, in order. Further text encoders only if they exist or are required."""
    further = dict.fromkeys(part for one in families().values() for part in one.text_parts if part != TEXT_ENCODER)
    low_noise = [LOW_NOISE_PART] if _has_low_noise(path) else []
    text = [part for part in further if has_folder(root, part) or is_in_index(root, part)]
    return [TRANSFORMER, *low_noise, TEXT_ENCODER, *text, VAE]


def _has_low_noise(path: str) -> bool:
    try:
        return has_low_noise(path)
    except ValueError:  # it is required but missing; `_inspect_part` reports it
        return True


def _inspect_part(part: str, path: str, experts: list[Component]) -> Found:
    """Checks a part. experts: the usable experts so far, to which this one is added if it matches them."""
    try:
        component = find_transformer(path, part) if part.startswith(TRANSFORMER) else find_part(path, part)
    except ValueError as error:
        return Found(part, None, str(error))
    try:
        check_component(component)
        if part in TRANSFORMERS:
            check_experts([*experts, component])
            experts.append(component)
    except ValueError as error:
        return Found(part, component, str(error))
    return Found(part, component, None)


def _row(found: Found, root: Path) -> tuple[str, ...]:
    component = found.component
    if component is None:
        exists = root.is_file() or has_folder(root, found.part)
        return found.part, "-", "-", "-", "-", ("not usable" if exists else "missing") if found.fault else "-"
    try:
        (dtypes, count), form = _contents(component), _format(component)
    except ValueError:  # already reported as its fault
        return found.part, _container(component), str(len(component.shards)), "-", "-", "incomplete"
    size, weights = f"{component.nbytes / 1e9:.2f} GB", f"{count / 1e6:,.1f} M"
    state = "incomplete" if found.fault else "complete"
    return (
        found.part, form, str(len(component.shards)), ", ".join(dtypes), size, f"{weights}, {state}"
    )  # fmt: skip


def _contents(component: Component) -> tuple[list[str], int]:
    """The dtypes of the component's tensors, the most frequent first, and the number of parameters."""
    numbers: Counter[str] = Counter()
    for shard in component.shards:
        with open_tensors(shard) as file:
            own = {name: shape for name, shape in file.shapes.items() if component.rename(name, shard) is not None}
            blocks = getattr(file, "kinds", {})
            for name, shape in own.items():
                numbers[blocks.get(name) or str(file.dtype(name)).removeprefix("torch.")] += math.prod(shape)
    return [dtype for dtype, _ in numbers.most_common()], numbers.total()


def _format(component: Component) -> str:
    if component.quantized is not None:
        return f"msModelSlim {', '.join(component.quantized.algorithms)}"
    formats = [name for name in formats_of(component) if name not in FP8_FORMATS]  # fp8 is among the dtypes
    return ", ".join([_container(component), *formats])


def _container(component: Component) -> str:
    first = component.shards[0]
    if component.folder is not None:
        return "diffusers"
    if first.is_dir() or first.parent.name.startswith("mp_rank_"):
        return "MindSpeed-MM"
    return "original" if original_family(first.parent) or first.suffix in (".pth", ".pt") else "single file"


def _describe_defaults(path: str, transformers: list[Component]) -> Iterator[str]:
    """Describes the model's default settings in a line, after what its files leave open; nothing about settings if
    their file is unusable, which is reported as the transformer's fault."""
    transformer, experts = transformers[0], len(transformers)
    if transformer.folder is None and (text := transformer.family.left_open(transformer.config)):
        yield f"left open: {text}"
    try:
        own = defaults_for(DiffusionModelSpec(path=path), transformer, experts)
    except ValueError:
        return
    name, source = transformer.family.defaults(transformer.config, experts).name, "its default settings"
    if own.source is not None:
        source = f"default settings from {own.source.name}"
    elif own.distilled is not None:
        source = f"distilled to few steps, by its name ({own.distilled}); {source}"
    yield f"recognised as {name}; {source}: {_settings(own)}"


def _settings(own: Defaults) -> str:
    low_noise = "" if own.low_noise_guidance is None else f" and {own.low_noise_guidance:g} (low noise)"
    embedded = "" if own.embedded_guidance is None else f", embedded guidance {own.embedded_guidance:g}"
    boundary = "" if own.boundary is None else f", boundary {own.boundary:g}"
    first, end = own.static_steps or (0, 0)
    static = f", static scales in steps {first} to {end - 1}" * (own.static_steps is not None)
    small = "" if own.small_shift is None else f" ({own.small_shift:g} up to 832 x 480)"
    sigmas = "" if own.sigmas is None else f"sigmas {', '.join(map('{:g}'.format, own.sigmas))}"
    noise = sigmas or f"shift {own.shift:g}{small}"
    return (
        f"{own.steps} steps, {noise}, guidance {own.guidance_scale:g}{low_noise}{embedded}"
        f"{boundary}, "
        f"{own.width} x {own.height}, {own.num_frames} frames at {own.fps} fps{static}"
    )
