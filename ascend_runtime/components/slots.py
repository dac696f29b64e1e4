"""Keeps the networks that a rank holds, one slot for each kind of spec, and two for diffusion models."""

from __future__ import annotations

import gc
import logging
from functools import partial
from typing import Any, Callable, Hashable

import torch
from msgspec.structs import replace

from ..checkpoints.reader import BytesRead
from ..errors import coded_error
from ..hardware import devices
from ..parallel.fsdp import Sharding, own_part
from ..recognition.component import Component
from ..recognition.defaults import defaults_for
from ..specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec, VisionSpec
from . import diffusion_model, text_encoder, vae, vision
from .diffusion_model import DiffusionModel
from .loras.adapter import use_loras
from .pinned import require_room_for_originals
from .room import ROOM_TO_COMPUTE, HostMemory, Room
from .standby import ROOM_FOR_OTHERS, DiffusionModels, HeldModel, ModelKey

logger = logging.getLogger(__name__)

LOADERS = {DiffusionModelSpec: diffusion_model, TextEncoderSpec: text_encoder, VisionSpec: vision, VaeSpec: vae}


class Components:
    """A component is loaded at the first `get` of its spec. It is kept until another of its kind replaces it, its files
    change on disk, or all are freed. Of diffusion models two are kept: see `standby.py`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._slots: dict[type, tuple[Any, Any]] = {}
        self.models = DiffusionModels(device)

    def get(
        self, spec, on_bytes: Callable[[int, int], None], sharding: Sharding = Sharding(),
        host_memory: HostMemory | None = None, computing: int | None = None,
    ) -> Any:  # fmt: skip
        """The component that `spec` describes. LoRAs are merged into a loaded component, so that changing them does not
        load it again.

        on_bytes: called with (bytes done, bytes in total) after each tensor that is read or changed by LoRAs. Counts
            whole tensors on disk, of all networks. Not called if there is nothing to do.
        sharding: how the weights of a diffusion model or a text encoder are sharded over ranks; a VAE is replicated.
        host_memory: None: what is available now.
        computing: the bytes of the device that the job takes besides a diffusion model's weights, or with those of
            another network; None: not known.

        Names and shapes of all networks and LoRAs are checked before anything is allocated. Raises ValueError if they
        do not fit, or if a file changes meanwhile.
        """
        progress = BytesRead(on_bytes)
        host_memory = host_memory or HostMemory(devices.host_memory(), *self.models.on_host)
        needed = ROOM_TO_COMPUTE if computing is None else computing
        room = Room(self._device, sharding, host_memory, self.models.give_way, needed)
        if isinstance(spec, DiffusionModelSpec):
            return self._model(spec, progress, room, computing)
        if getattr(spec, "placement", "ranks") == "ranks":
            self.models.leave_device(host_memory, ROOM_FOR_OTHERS if computing is None else computing)
        component = self._held(spec, progress, room)
        if isinstance(spec, VaeSpec):
            component.to(self._device)  # `_make_room` may have moved it to the host
        return component

    def _model(
        self, spec: DiffusionModelSpec, progress: BytesRead, room: Room, computing: int | None
    ) -> DiffusionModel:
        found = diffusion_model.files(spec)
        key = ModelKey(_loaded(spec), room.sharding, _state(found))
        self.models.drop_outdated(key, room.host_memory)
        model = self.models.use(key, room.host_memory, room.computing)
        is_new = model is None
        if model is None:
            opened = diffusion_model.opened(spec, found, room, progress)
            taken = opened.nbytes
            self.models.make_room(taken, room.host_memory, room.computing)
            model = opened.read()
            self._check_unchanged(spec, key.state)
            self.models.in_use = HeldModel(key, model, taken)
        use_loras(model.adapters, spec.loras, progress, partial(_check_originals, model, is_new, room))
        model.defaults = defaults_for(spec, found[0], experts=len(found))  # LoRAs may change them
        if computing is not None:
            self.models.clear_for(computing, room.host_memory)
        self._make_room(room.computing)
        return model

    def _held(self, spec, progress: BytesRead, room: Room) -> Any:
        kind = LOADERS[type(spec)]
        found = kind.files(spec)
        key = (_loaded(spec), room.sharding, _state(found))
        held = self._slots.get(type(spec))
        if held is None or held[0] != key:
            self.drop(type(spec))  # before loading, so that two are never held at once
            component = kind.load(spec, found, room, progress)
            self._check_unchanged(spec, key[-1])
            self._slots[type(spec)] = held = (key, component)
        return held[1]

    def _check_unchanged(self, spec, state: Hashable) -> None:
        if self.state(spec) != state:
            raise coded_error("AV-1315", f"{spec.path} changed while it was read. Run the job again.")

    def _make_room(self, computing: int) -> None:
        """Moves the VAE to the host if a diffusion model would otherwise have too little memory to compute in; drops
        text encoders on the device if that does not suffice. The next use of the VAE reads no file."""
        words = "%.1f GB are free for sampling, which takes %.1f GB: %s."
        room = devices.room(self._device)
        if VaeSpec in self._slots and self._slots[VaeSpec][1].device.type != "cpu" and room < computing:
            logger.info(words, room / 1e9, computing / 1e9, "the VAE is moved to host memory")
            self._slots[VaeSpec][1].to("cpu")
            devices.empty_cache(self._device)
        for kind in (VisionSpec, TextEncoderSpec):
            on_device = kind in self._slots and self._slots[kind][0][0].placement == "ranks"
            room = devices.room(self._device)
            if on_device and self._device.type != "cpu" and room < computing:
                logger.info(words, room / 1e9, computing / 1e9, "the text encoder is dropped")
                self.drop(kind)

    @property
    def makes_room(self) -> int:
        """The bytes of this rank's device that components would give back to a job with another diffusion model."""
        others = 0 if self._device.type == "cpu" else sum(
            own_part(weight).nbytes
            for kind, (_, component) in self._slots.items()
            for network in LOADERS[kind].networks(component)
            for weight in network.parameters()
            if weight.device.type != "cpu"
        )  # fmt: skip
        return self.models.makes_room + others

    def place_of(self, spec: TextEncoderSpec) -> str | None:
        """Where the text encoders of this spec are, whatever placement it asks for; None: they are not here."""
        if TextEncoderSpec not in self._slots:
            return None
        held, spec = self._slots[TextEncoderSpec][0][0], _loaded(spec)
        return held.placement if replace(held, placement=spec.placement) == spec else None

    def found(self, spec) -> list[Component]:
        """The networks on disk that `spec` describes. Loads nothing. Raises ValueError if they are missing."""
        return LOADERS[type(spec)].files(spec)

    def state(self, spec) -> Hashable:
        """A value that changes when a file of the component that `spec` describes changes. Loads nothing."""
        return _state(self.found(spec))

    def free(self) -> None:
        self.models.drop()
        for kind in list(self._slots):
            self.drop(kind)

    def drop(self, kind: type) -> None:
        """Frees the component of this kind of spec, if there is one."""
        if self._slots.pop(kind, None) is not None:
            gc.collect()
            devices.empty_cache(self._device)


def _check_originals(model: DiffusionModel, is_new: bool, room: Room, nbytes: int) -> None:
    """Raises ValueError if the host has too little memory for the originals of weights that LoRAs change. They were
    counted with experts in turns that were loaded in the same job."""
    if not (is_new and model.swap):
        require_room_for_originals(nbytes, room.free_host(nbytes), room.host_memory.ranks)


def _loaded(spec) -> Any:
    """The spec without what does not change the weights."""
    if isinstance(spec, DiffusionModelSpec):
        return replace(spec, loras=())
    if isinstance(spec, TextEncoderSpec):
        return replace(spec, vision_path=None)
    return replace(spec, tiles="auto") if isinstance(spec, VaeSpec) else spec


def _state(found: list[Component]) -> Hashable:
    return tuple(component.fingerprint for component in found)
