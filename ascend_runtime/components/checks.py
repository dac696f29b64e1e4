"""Whether a component can be loaded, without loading it."""

from __future__ import annotations

from ..models.family import TEXT_ENCODER, TRANSFORMER
from ..recognition.component import Component
from ..recognition.defaults import defaults_in
from .model_config import own_boundary
from .networks import empty_network
from .text_encoder import check_size, find_tokenizer


def check(component: Component) -> None:
    """Raises ValueError for one which cannot be loaded, whatever is next to it. No weight is read."""
    network = empty_network(component)
    if component.kind.name.startswith(TEXT_ENCODER):
        check_size(find_tokenizer(component), network, component)
    if component.kind.name == TRANSFORMER:
        own_boundary(component)
        defaults_in(component, experts=1)
    component.places_in(network)
