"""Recognises models and LoRAs that were distilled to few steps, by the names and metadata of their files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ..checkpoints.bounded import read_json
from ..checkpoints.opening import open_tensors
from ..checkpoints.states import states
from ..models.defaults import Defaults, Distillation
from ..specs import DiffusionModelSpec, LoraSpec
from .lora.keys import HIGH_NOISE, LOW_NOISE

# Where programs that save .safetensors files write their name: Stability's model specification, kohya's scripts.
TITLES = ("modelspec.title", "ss_output_name", "title", "name")
# Names of LoRAs' files that say nothing: LightX2V's of each expert, PEFT's, diffusers'. Their folder's name does.
NAMELESS = ("high_noise_model", "low_noise_model", "adapter_model", "pytorch_lora_weights")
EXPERTS = (HIGH_NOISE, LOW_NOISE)


def with_distillation(own: Defaults, kinds: Sequence[Distillation], spec: DiffusionModelSpec, experts: int) -> Defaults:
    """The defaults of a model, `own`, with those of the distillation of its files or LoRAs, if there is one.

    kinds: those of its family. experts: how many it has. A model counts as distilled if each of its experts is: if only
    one of them is, its steps do not suit the other. Names of LoRAs count before those of the model, and these not at
    all if the model has a file with its own defaults.
    """
    found = [_of_expert(expert, kinds, spec, by_model=own.source is None) for expert in EXPERTS[:experts]]
    if None in found:
        return own
    kind, name = found[0]
    return kind.over(own, name)


def _of_expert(
    expert: str, kinds: Sequence[Distillation], spec: DiffusionModelSpec, by_model: bool
) -> tuple[Distillation, str] | None:
    """(the distillation of an expert, the name that shows it); None if there is none."""
    model = spec.low_noise_path if expert == EXPERTS[1] and spec.low_noise_path else spec.path
    loras = [lora for lora in reversed(spec.loras) if lora.strength and lora.expert in ("both", expert)]
    for name in (*_names_of_loras(loras), *(_names_of_model(Path(model)) if by_model else ())):
        for kind in kinds:
            if kind.is_named(name):
                return kind, name
    return None


def _names_of_loras(loras: Iterable[LoraSpec]) -> Iterator[str]:
    for lora in loras:
        path = Path(lora.path)
        yield path.stem
        if path.stem in NAMELESS:
            yield path.parent.name
        yield from _titles(path)


def _names_of_model(path: Path) -> Iterator[str]:
    """The names of a model's file or folder, of the folder that it lies in, and in its metadata."""
    yield from (path.name, path.parent.name)
    yield from _titles(path)


def _titles(path: Path) -> tuple[str, ...]:
    index = path / "model_index.json"
    file = index if index.is_file() else path if path.suffix in (".safetensors", ".sft") and path.is_file() else None
    return () if file is None else _read(file, states((file,)))


@lru_cache(maxsize=64)
def _read(file: Path, _: tuple) -> tuple[str, ...]:
    """The names in a file's metadata. Cached until it changes, as each job asks."""
    if file.suffix == ".json":
        return (str(read_json(file).get("_class_name", "")),)
    with open_tensors(file) as opened:
        return tuple(str(opened.header[key]) for key in TITLES if key in opened.header)
