"""Checks whether a component can be loaded, without loading it."""

from __future__ import annotations

from ..models.family import TEXT_ENCODER, TRANSFORMER
from ..models.shared.quantized.static import check_static_steps
from ..recognition.component import Component
from ..recognition.defaults import defaults_in
from ..recognition.experts import stored_boundary
from .networks import empty_network
from .text_encoder import check_size, find_tokenizer


def check_component(component: Component) -> None:
    """Raises ValueError for a component that cannot be loaded, whatever lies next to it. Reads no weights."""
    network = empty_network(component)
    if component.kind.name.startswith(TEXT_ENCODER) and (component.tokenizer or component.part.brings_tokenizer):
        check_size(find_tokenizer(component), network, component)
    if component.kind.name == TRANSFORMER:
        stored_boundary(component)
        own = defaults_in(component, experts=1)
        check_static_steps(network, own.static_steps, own.source)
    component.places_in(network)
