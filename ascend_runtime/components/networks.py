"""Builds networks on the meta device, without weights, from their configs."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.configs import check_counts
from ..checkpoints.faults import as_value_error
from ..models.shared.quantized.replacing import check_cuts, quantize
from ..parallel.tensor import TensorParallel, WholeWeights
from ..recognition.component import Component


def empty_network(component: Component, tp: WholeWeights | TensorParallel = WholeWeights()) -> nn.Module:
    """A component's network. tp: how tensor parallelism cuts a transformer. Raises ValueError for a config that no
    network can be built from."""
    check_counts(component.config, component.config_file)
    with as_value_error(component.config_file, f"its {component.kind.name} config"):
        network = component.family.network(component.kind.name, component.config)
    if tp.degree > 1:
        network = component.family.network(component.kind.name, component.config, tp)
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(component.parameters), component.part.blocks)
        check_cuts(network, component.family.weights.cut_dim, tp.degree)
    return network


def whole_network(component: Component) -> nn.Module:
    """As `empty_network`, with the parameters that are not used too."""
    check_counts(component.config, component.config_file)
    with as_value_error(component.config_file, f"its {component.kind.name} config"):
        return component.family.whole_network(component.kind.name, component.config)


def dtype_named(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)
