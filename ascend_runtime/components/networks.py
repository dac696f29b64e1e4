"""Networks without their weights, on the meta device, as configs describe them."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.configs import check_counts
from ..checkpoints.faults import usable
from ..models.shared.quantized import quantize
from ..parallel.tensor import TensorParallel, WholeWeights
from ..recognition.component import Component


def empty_network(component: Component, tp: WholeWeights | TensorParallel = WholeWeights()) -> nn.Module:
    """A component's network. tp: how tensor parallelism cuts a transformer. Raises ValueError where its config makes
    none."""
    check_counts(component.config, component.config_file)
    with usable(component.config_file, f"its config of a {component.kind.name}"):
        network = component.family.network(component.kind.name, component.config)
    if tp.degree > 1:
        network = component.family.network(component.kind.name, component.config, tp)
    if component.quantized is not None:
        quantize(network, component.quantized.renamed(component.parameters), component.part.blocks)
    return network


def dtype_named(name: str, automatic: torch.dtype) -> torch.dtype:
    return automatic if name == "auto" else getattr(torch, name)
