"""Finds a diffusion model's one or two experts, and the boundary between them."""

from __future__ import annotations

from ..checkpoints.bounded import read_json
from ..checkpoints.faults import shown
from ..errors import coded_error
from ..models.defaults import Defaults
from ..specs import DiffusionModelSpec
from .component import Component
from .folders import has_low_noise
from .layout import find_transformer

EXAMPLE_BOUNDARY = 0.875  # Wan2.2-T2V-A14B's, which an error shows as an example


def find_experts(spec: DiffusionModelSpec) -> list[Component]:
    """The high-noise expert, and the low-noise expert if there is one."""
    found = [find_transformer(spec.path)]
    low_noise = spec.low_noise_path or spec.path
    if has_low_noise(low_noise):
        found.append(find_transformer(low_noise, "transformer_2"))
    elif spec.low_noise_path is not None:
        found.append(find_transformer(low_noise))
    if len(found) == 2 and found[0].shards == found[1].shards:
        raise coded_error(
            "AV-1403", f"{found[0].shards[0]} is given as both experts. Give the low-noise expert's file, or none."
        )
    for component in found:
        if component.quantized is not None:
            _check_quantized_files(spec, component)
    return found


def _check_quantized_files(spec: DiffusionModelSpec, component: Component) -> None:
    if spec.quantization != "none":
        raise ValueError(
            f"quantization is {spec.quantization!r}, but {component.quantized.file} says that the model is quantized "
            "already. Set quantization to 'none' to use the files as they are."
        )


def boundary_of(spec: DiffusionModelSpec, component: Component, defaults: Defaults, experts: int = 1) -> float:
    """The fraction of the timesteps above which the high-noise expert is used: the spec's, else the folder's, else the
    published model's; 0 if none says one.

    Raises ValueError for two experts without one: the low-noise expert would never be used.
    """
    boundary = stored_boundary(component) if spec.boundary is None else spec.boundary
    boundary = defaults.boundary if boundary is None else boundary
    if boundary is None and experts > 1:
        raise coded_error(
            "AV-1309",
            f"{component.shards[0]} and its low-noise expert have no boundary, and {component.family.title} has no "
            f"default. Set the boundary, such as {EXAMPLE_BOUNDARY}, or write it as boundary_ratio into "
            "model_index.json.",
        )
    return boundary or 0.0


def stored_boundary(component: Component) -> float | None:
    """The boundary in a model's folder, if any. Raises ValueError if it is not a number from 0 to 1."""
    index = component.root and component.root / "model_index.json"
    boundary = read_json(index).get("boundary_ratio") if index and index.is_file() else None
    if boundary is not None and (type(boundary) not in (int, float) or not 0 <= boundary <= 1):
        raise coded_error(
            "AV-1309",
            f"{index} has the boundary_ratio {shown(repr(boundary))}; it must be a number from 0 to 1, such as "
            f"{EXAMPLE_BOUNDARY}. Correct it, or download the file again.",
        )
    return boundary
