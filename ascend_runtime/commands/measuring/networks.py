"""Small networks of a model's family with random weights, in a folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch

from ...checkpoints.writing.writers import lay_out, starts, write_at
from ...models.family import TRANSFORMER, Family
from ...planner.facts import Network

SPREAD = 0.02  # of biases, and of norms' weights around 1


def transformer(folder: Path, family: Family, like: Network, heads: int, blocks: int) -> Network:
    """Writes a transformer in diffusers' layout; each call its own folder. like: the model's own."""
    return written(folder, family, TRANSFORMER, family.smaller(like.config, heads, blocks))


def written(folder: Path, family: Family, part: str, config: dict) -> Network:
    """Writes a network with random weights, from a fixed seed, in fp32."""
    folder.mkdir(parents=True)
    network, path = family.network(part, config), folder / "diffusion_pytorch_model.safetensors"
    parameters = dict(network.named_parameters())
    lay_out(path, parameters)
    generator = torch.Generator().manual_seed(0)
    with path.open("r+b") as file:
        for name, start in starts(path).items():
            write_at(file.fileno(), _random(name, parameters[name].shape, generator), start)
    _, class_name = family.parts[part].class_name
    fields = {**config, family.parts[part].class_name[0]: class_name}
    (folder / "config.json").write_text(json.dumps(fields, default=list))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Network(part, config, shapes, stored=os.path.getsize(path))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the size of what passes through them."""
    drawn = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return drawn / math.prod(shape[1:]) ** 0.5
    return drawn * SPREAD + (0.0 if name.endswith("bias") else 1.0)
