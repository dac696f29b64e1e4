"""Small networks of a model's family with random weights, in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ...checkpoints.writing.writers import lay_out, starts, write_at
from ...models.family import TRANSFORMER, Family
from ...planner.facts import Network

SPREAD = 0.02  # of the weights: activations stay finite through many blocks


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
            write_at(file.fileno(), torch.randn(parameters[name].shape, generator=generator) * SPREAD, start)
    _, class_name = family.parts[part].class_name
    fields = {**config, family.parts[part].class_name[0]: class_name}
    (folder / "config.json").write_text(json.dumps(fields, default=list))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Network(part, config, shapes, stored=os.path.getsize(path))
