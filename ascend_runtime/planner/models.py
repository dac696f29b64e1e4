"""The facts of a model: from the headers of its files, or of a published model by its name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hardware import cores
from ..models.family import TRANSFORMER, VAE, Family
from ..models.registry import families
from ..specs import DiffusionModelSpec, LoraSpec, TextEncoderSpec, VaeSpec
from .facts import Model, Network, StoredBlocks

if TYPE_CHECKING:
    from torch import nn

    from ..recognition.component import Component

IN_16_BITS, IN_8_BITS = "bfloat16", "float8_e4m3fn"
BYTES = {IN_16_BITS: 2, IN_8_BITS: 1}
SMALL_ENCODER = 2**30  # bytes on disk; on a CPU, a smaller text encoder computes in fp32


def read(
    model: DiffusionModelSpec, encoder: TextEncoderSpec | None = None, vae: VaeSpec | None = None, kind: str = "npu"
) -> Model:
    """Of files; reads headers only. kind: of the devices, which decides automatic dtypes. Raises ValueError for files
    that cannot be used."""
    from ..recognition.defaults import defaults_for
    from ..recognition.experts import boundary_of, find_experts

    found = find_experts(model)
    own = defaults_for(model, found[0], experts=len(found))
    boundary = boundary_of(model, found[0], own, len(found))
    text = [] if encoder is None else _encoders(encoder)
    on_cpu = encoder is None or encoder.placement != "ranks" or kind == "cpu"
    text_dtype = _text_dtype(sum(one.nbytes for one in text)) if on_cpu else IN_16_BITS
    return Model(
        family=found[0].family,
        experts=tuple(_of_files(_kept(one, model, kind), model.quantization) for one in found),
        defaults=replace(own, boundary=boundary if len(found) == 2 else own.boundary),
        dtype=_named(model.dtype, _dtype(kind)),
        encoders=tuple(map(_of_files, text)),
        text_dtype=_named(encoder.dtype if encoder else "auto", text_dtype),
        vae=None if vae is None else _found_vae(vae),
        vae_dtype="float32" if vae and vae.strict else _named(vae.dtype if vae else "auto", _vae_dtype(kind)),
    )


def lora_numbers(loras: Iterable[LoraSpec], experts: int) -> int:
    """The numbers in the files of LoRAs, by their headers, for each of so many experts that gets them; those of biases
    count as they are kept, in fp32 and once more as a sum. Raises ValueError for files that cannot be read."""
    from ..checkpoints.opening import open_tensors

    total = 0
    for spec in loras:
        with open_tensors(Path(spec.path)) as file:
            own = sum((4 if len(shape) == 1 else 1) * math.prod(shape) for shape in file.shapes.values())
        total += own * (experts if spec.expert == "both" else 1)
    return total


def published(name: str, kind: str = "npu", quantization: str = "none", stored: str = IN_16_BITS) -> Model:
    """Of a published model, such as "Wan2.2-T2V-A14B", without files. stored: the dtype of the weights on disk,
    bfloat16 or float8_e4m3fn. Raises ValueError for an unknown name."""
    return _published(_known_name(name), kind, quantization, stored)


@lru_cache(maxsize=64)
def _published(name: str, kind: str, quantization: str, stored: str) -> Model:
    family = next(one for one in families().values() if name in one.published)
    configs, parts = family.published[name].transformers, family.published[name].parts
    return Model(
        family=family,
        experts=tuple(_of_config(family, TRANSFORMER, config, quantization, stored) for config in configs),
        defaults=family.defaults(configs[0], len(configs)),
        dtype=_dtype(kind),
        encoders=tuple(_of_config(family, part, parts[part], stored=stored) for part in parts if part != VAE),
        vae=_of_config(family, VAE, parts[VAE]),
        vae_dtype=_vae_dtype(kind),
    )


def completed(model: Model, kind: str = "npu") -> tuple[Model, list[str]]:
    """A model with the text encoders and the VAE of a published one with such latents where it has none, and a note
    about each."""
    form, notes = model.family.form(model.experts[0].config), []
    if model.encoders and model.vae is not None:
        return model, notes
    for name in model.family.published:
        like = published(name, kind)
        if like.family.vae_form(like.vae.config) != form:
            continue
        if not model.encoders:
            model = replace(model, encoders=like.encoders, text_dtype=like.text_dtype)
            notes.append(f"text encoder: none is given; that of {name} is assumed")
        if model.vae is None:
            model = replace(model, vae=like.vae, vae_dtype=like.vae_dtype)
            notes.append(f"VAE: none is given; that of {name} is assumed")
        break
    return model, notes


def names() -> tuple[str, ...]:
    """The names of the published models."""
    return tuple(name for family in families().values() for name in family.published)


def is_published(name: str) -> bool:
    return any(_plain(name) == _plain(one) for one in names())


def _known_name(name: str) -> str:
    for one in names():
        if _plain(one) == _plain(name):
            return one
    raise ValueError(f"{name!r} is neither a file or folder nor a published model; these are {', '.join(names())}.")


def _plain(name: str) -> str:
    """A name without the organisation before it and the layout after it."""
    return name.rpartition("/")[2].lower().removesuffix("-diffusers")


# Networks


def _of_files(component: Component, quantization: str = "none") -> Network:
    from ..models.shared.quantized.replacing import quantize

    network = _network_of(component)
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(component.parameters), component.part.blocks)
    types = _types(component, network)
    packed = _packed(component, network) if quantization == "none" else {}
    made = _network(component.family, component.kind.name, component.config, network, quantization)
    return replace(made, stored=component.nbytes, stored_types=types, packed=packed)


def _network_of(component: Component) -> nn.Module:
    from ..checkpoints.configs import check_counts
    from ..checkpoints.faults import as_value_error

    check_counts(component.config, component.config_file)
    with as_value_error(component.config_file, f"its {component.kind.name} config"):
        return component.family.network(component.kind.name, component.config)


def _kept(component: Component, model: DiffusionModelSpec, kind: str) -> Component:
    """A transformer with the layers that keep ComfyUI's marked weights on devices of this kind. Those in MXFP8 count as
    dequantized, as their products depend on the card."""
    from ..checkpoints.msmodelslim import DYNAMIC
    from ..models.shared.quantized.replacing import linears
    from ..recognition.few_bits import formats_of, with_few_bits

    lacks_products = kind == "npu" and _named(model.dtype, _dtype(kind)) == "float32"
    if component.quantized is not None or model.packed is False or lacks_products or not formats_of(component):
        return component
    names = linears(_network_of(component), lambda name: True)
    return with_few_bits(component, names, lambda algorithm: algorithm == DYNAMIC)


def _packed(component: Component, network: nn.Module) -> dict[str, StoredBlocks]:
    """The weights of a transformer that can stay in the blocks of its GGUF file."""
    from ..models.shared.quantized.replacing import linears
    from ..ops.blocks.ggml import BLOCK_TYPES
    from ..recognition.packed import weights_in_blocks

    if component.kind.name != TRANSFORMER:
        return {}
    kinds = weights_in_blocks(component, partial(linears, network, lambda name: True))
    sizes = {name: (one.values, one.nbytes) for name, one in BLOCK_TYPES.items()}
    return {name: StoredBlocks(kind, *sizes[kind]) for name, kind in kinds.items()}


def _of_config(
    family: Family, part: str, config: Mapping[str, Any], quantization: str = "none", stored: str = IN_16_BITS
) -> Network:
    from ..models.shared.quantized.replacing import linears

    network, whole = family.network(part, config), family.whole_network(part, config)
    in_8_bits = stored == IN_8_BITS and part != VAE
    small = {f"{name}.weight" for name in linears(network, lambda name: True)} if in_8_bits else set()
    types = {name: IN_8_BITS if name in small else IN_16_BITS for name, _ in network.named_parameters()}
    unread = _count(whole.parameters()) - _count(network.parameters())
    bytes_read = sum(BYTES[types[name]] * x.numel() for name, x in network.named_parameters())
    made = _network(family, part, config, network, quantization)
    return replace(made, stored=bytes_read + BYTES[IN_8_BITS if in_8_bits else IN_16_BITS] * unread, stored_types=types)


def _network(
    family: Family, part: str, config: Mapping[str, Any], network: nn.Module, quantization: str
) -> Network:  # fmt: skip
    """quantization: on the fly."""
    from ..models.shared.quantized.replacing import (
        QUANTIZATION_SCHEMES,
        linears,
        multiples_of,
        quantize,
        quantized_parameters,
    )

    if quantization != "none":
        layers = dict.fromkeys(linears(network, family.weights.in_8_bits), QUANTIZATION_SCHEMES[quantization])
        quantize(network, layers, family.parts[part].blocks)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    quantized = {name: _dtype_name(dtype) for name, dtype in quantized_parameters(network).items()}
    return Network(part, config, shapes, quantized=quantized, multiples=multiples_of(network))


def _types(component: Component, network: nn.Module) -> dict[str, str]:
    """The dtype on disk of each parameter, by name; "" for one that no dtype keeps as it lies there. Raises ValueError
    for files that do not fit."""
    places = component.places_in(network)
    return {name: _dtype_name(one.dtype) if one.is_kept_as_stored(one.dtype) else "" for name, one in places.items()}


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _count(parameters: Iterable[Any]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def text_encoders(spec: TextEncoderSpec) -> tuple[Family, tuple[Network, ...]]:
    """The family and the text encoders of a spec, the main one first. Raises ValueError for files that cannot be
    used."""
    found = _encoders(spec)
    return found[0].family, tuple(map(_of_files, found))


def _encoders(spec: TextEncoderSpec) -> list[Component]:
    """The text encoders, and the vision tower that lies with them or is given."""
    from ..models.family import VISION
    from ..recognition.text_encoders import find_text_encoders, find_vision, sees_images

    found = find_text_encoders(spec)
    sees = spec.vision_path is not None or sees_images(Path(spec.path))
    return [*found, find_vision(spec.vision)] if sees and VISION in found[0].family.parts else found


def _found_vae(spec: VaeSpec) -> Network:
    from ..recognition.layout import find_vae

    return _of_files(find_vae(spec.path))


# Dtypes


def _dtype(kind: str) -> str:
    return "float32" if kind == "cpu" else "bfloat16"


def _vae_dtype(kind: str) -> str:
    return "bfloat16" if kind == "npu" else "float32"


def _text_dtype(nbytes: int) -> str:
    """Of an encoder with this number of bytes on disk on a host's CPU."""
    return "bfloat16" if nbytes >= SMALL_ENCODER and cores.compute_bfloat16() else "float32"


def _named(given: str, automatic: str) -> str:
    return automatic if given == "auto" else given
