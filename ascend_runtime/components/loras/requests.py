"""Which LoRAs a job asks for, for which expert, and their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ...checkpoints.reader import Places
from ...errors import coded_error
from ...models.family import LoraNames
from ...models.shapes import Shapes
from ...models.shared.quantized.base import QuantizedLinear
from ...recognition.lora.files import LoraFile, fingerprint, read_lora
from ...specs import LoraSpec

LorasInUse = list[tuple[LoraFile, float]]  # with their strengths, in the order in which they are added


@dataclass(frozen=True)
class LoraTarget:
    """A network that LoRAs change.

    places: where its parameters lie on disk. names: how LoRA files name its layers. expert: which of two experts it is;
    None: the model has one. layers: its quantized layers, whose weights LoRAs leave as they are, with the shapes that
    their weight and bias have for LoRAs.
    """

    places: Places
    names: LoraNames
    expert: str | None = None
    layers: Mapping[str, Shapes] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, places: Places, names: LoraNames, expert: str | None) -> LoraTarget:
        layers = {name: layer.shapes for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)}
        return cls(places, names, expert, layers)

    @cached_property
    def shapes(self) -> Shapes:
        """The full shapes of the parameters that LoRAs can change, by name."""
        plain = {name: place.shape for name, place in self.places.items() if not self.is_quantized(name)}
        return plain | {f"{name}.{leaf}": x for name, shapes in self.layers.items() for leaf, x in shapes.items()}

    def is_quantized(self, name: str) -> bool:
        """Whether a parameter belongs to a quantized layer."""
        return name.rpartition(".")[0] in self.layers


def by_expert(specs: tuple[LoraSpec, ...], experts: list[str]) -> dict[str, list[LoraSpec]]:
    """The LoRAs of each expert. Raises ValueError if one is for an expert that the model lacks."""
    for spec in specs:
        if spec.expert != "both" and len(experts) == 1:
            raise coded_error(
                "AV-1404",
                f"The LoRA {spec.path} is for the expert {spec.expert}, but this model has only one expert. "
                "Set expert to 'both'.",
            )
    return {expert: [spec for spec in specs if spec.expert in ("both", expert)] for expert in experts}


def read_loras(specs: list[LoraSpec], target: LoraTarget, known: Iterable[LoraFile] = ()) -> LorasInUse:
    """LoRAs for a network; `known` files are not read again. Raises ValueError for a file that does not fit."""
    files = {(file.fingerprint, file.misfits): file for file in known}
    loras = []
    for spec in specs:
        file = files.get((fingerprint(spec.path), spec.misfits)) or read_lora(
            spec.path, target.shapes, target.names, target.expert, spec.misfits
        )
        if not file.changes and spec.expert != "both" and spec.misfits == "refuse":
            raise coded_error(
                "AV-1404",
                f"The LoRA {spec.path} is set for the expert {spec.expert}, but all its layers are for the other one. "
                "Set expert to 'both', which gives each expert its own layers.",
            )
        _check_quantized(file, target)
        loras.append((file, spec.strength))
    return loras


def merged_by(loras: LorasInUse, target: LoraTarget) -> set[str]:
    """The names of the parameters into which these LoRAs are merged."""
    return {name for file, _ in loras for name in file.changes if not target.is_quantized(name)}


def read_for(loras: LorasInUse, target: LoraTarget) -> set[str]:
    """The same, and the weights of quantized layers that these LoRAs change."""
    names = {name for file, _ in loras for name in file.changes if target.is_quantized(name)}
    return merged_by(loras, target) | {f"{name.rpartition('.')[0]}.weight" for name in names}


def _check_quantized(file: LoraFile, target: LoraTarget) -> None:
    """Raises ValueError if changes of quantized layers depend on their weights."""
    depending = [name for name, change in file.changes.items() if change.depends and target.is_quantized(name)]
    if depending:
        raise coded_error(
            "AV-1406",
            f"{file.path} computes with the weights that it changes, as DoRA does, and {len(depending)} of them are "
            f"quantized, such as {depending[0]}. Set quantization to 'none' and use the model's bf16, fp16 or "
            "fp8_scaled files, or use a LoRA of another kind. In Python, packed=False dequantizes GGUF and ComfyUI's "
            "formats when they are read, which allows it.",
        )
