"""The VAE."""

from __future__ import annotations

import torch

from ..checkpoints.layout import Component, find_vae
from ..checkpoints.reader import Progress, check_weights, load_weights, nbytes
from ..families import wan_vae
from ..specs import VaeSpec
from .networks import dtype_named, empty_network


def files(spec: VaeSpec) -> list[Component]:
    return [find_vae(spec.path)]


def load(spec: VaeSpec, found: list[Component], device, progress: Progress, _):
    vae = empty_network("vae", found[0])
    places = check_weights(vae, found[0].shards, found[0].rename, split=found[0].split)
    progress.expect(nbytes(places))
    dtype = dtype_named(spec.dtype, torch.float32)
    load_weights(vae, places, dtype_of=lambda name: dtype, device=device, on_bytes=progress.add)
    return wan_vae.streamed(vae.eval())
