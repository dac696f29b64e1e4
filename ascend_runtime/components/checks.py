"""Whether a component can be loaded, without loading it."""

from __future__ import annotations

from ..checkpoints.layout import Component
from ..checkpoints.reader import check_weights
from ..families.defaults import defaults_in
from .model_config import own_boundary
from .networks import empty_network
from .text_encoder import check_size, find_tokenizer


def check(kind: str, component: Component) -> None:
    """Raises ValueError for a "transformer", "text_encoder" or "vae" which, whatever is beside it, cannot be loaded. No
    weight is read."""
    network = empty_network(kind, component)
    if kind == "text_encoder":
        check_size(find_tokenizer(component), network, component)
    if kind == "transformer":
        own_boundary(component)
        defaults_in(component, experts=1)
    check_weights(network, component.shards, component.rename, component.quantized, component.split)
