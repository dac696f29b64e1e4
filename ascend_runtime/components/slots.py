"""Which networks a rank holds: one slot a kind."""

from __future__ import annotations

import gc
import logging
from typing import Any, Callable, Hashable

import torch
from msgspec.structs import replace

from ..checkpoints.reader import ReadProgress
from ..hardware import devices
from ..parallel.fsdp import Sharding
from ..recognition.component import Component
from ..specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from . import diffusion_model, text_encoder, vae
from .loras import use_loras

logger = logging.getLogger(__name__)

KINDS = {DiffusionModelSpec: diffusion_model, TextEncoderSpec: text_encoder, VaeSpec: vae}


class Components:
    """One slot a kind: a described component is loaded when first asked for, and kept until another takes its place,
    its files change on disk, or all are freed."""

    def __init__(self, device: torch.device):
        self._device = device
        self._slots: dict[type, tuple[Any, Any]] = {}

    def get(self, spec, on_bytes: Callable[[int, int], None], sharding: Sharding = Sharding()) -> Any:
        """The component that `spec` describes. LoRAs are no part of what is loaded: they change it.

        on_bytes: told how many bytes are done, and how many there are, after each tensor that is read, or that changes
            for LoRAs: of whole tensors on disk, of all networks. Not called where nothing is to be done.
        sharding: how the weights of a diffusion model or a text encoder are spread over the ranks; a VAE is whole.

        Nothing is allocated before the names and shapes of all networks, and of LoRAs, are known to fit. Raises
        ValueError where they do not, or a file changes meanwhile.
        """
        progress = ReadProgress(on_bytes)
        component = self._held(spec, progress, sharding)
        if isinstance(spec, DiffusionModelSpec):
            use_loras(component.adapters, spec.loras, progress)
            self._make_room()
        if isinstance(spec, VaeSpec):
            component.to(self._device)  # it may have been moved away
        return component

    def _held(self, spec, progress: ReadProgress, sharding: Sharding) -> Any:
        kind = KINDS[type(spec)]
        found = kind.files(spec)
        base = replace(spec, loras=()) if isinstance(spec, DiffusionModelSpec) else spec
        key = (base, sharding, _state(found))
        held = self._slots.get(type(spec))
        if held is None or held[0] != key:
            self.drop(type(spec))  # first, so that never two are held
            self._slots[type(spec)] = held = (key, kind.load(spec, found, self._device, progress, sharding))
            if self.state(spec) != key[-1]:
                self.drop(type(spec))
                raise ValueError(f"{spec.path} changed while it was read. Run again.")
        return held[1]

    def _make_room(self) -> None:
        """Moves a VAE to the host where it leaves a card too little to compute in beside a diffusion model; no file is
        read when it is wanted again."""
        if VaeSpec not in self._slots or self._slots[VaeSpec][1].device.type == "cpu":
            return
        room = devices.room(self._device)
        if room < diffusion_model.ROOM_TO_COMPUTE:
            logger.info("%.1f GB are free to sample in: the VAE waits in the host's memory.", room / 1e9)
            self._slots[VaeSpec][1].to("cpu")
            devices.empty_cache(self._device)

    def found(self, spec) -> list[Component]:
        """The networks on disk that `spec` describes. Loads nothing. Raises ValueError where they are not there."""
        return KINDS[type(spec)].files(spec)

    def state(self, spec) -> Hashable:
        """Changes when a file does that makes the component that `spec` describes what it is. Loads nothing."""
        return _state(self.found(spec))

    def free(self) -> None:
        for kind in list(self._slots):
            self.drop(kind)

    def drop(self, kind: type) -> None:
        """Frees what a description of this kind stands for, if it is held."""
        if self._slots.pop(kind, None) is not None:
            gc.collect()
            devices.empty_cache(self._device)


def _state(found: list[Component]) -> Hashable:
    return tuple(component.fingerprint for component in found)
