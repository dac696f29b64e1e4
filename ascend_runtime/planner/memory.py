"""Predicts the bytes that a job holds on devices and on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..models.shapes import count
from .facts import ITEMSIZES, Arrangement, Machine, Memory, Model, Network, Video
from .holding.accelerators import outputs_kept
from .holding.kernels import MARGINS
from .holding.passes import gathered_bytes, network_of, own_branches, pass_bytes
from .holding.slabs import slabs_of
from .holding.vae_tiles import tile_bytes
from .holding.weights import NO_RULES, OwnPart, Share, kept, on_device, rules_of

# The latents in fp32 that a rank's host holds during the passes of the first step, the second and later ones, with
# UniPC, which holds the most: those of the solver and of the loop around it. Measured.
LATENTS_HELD = (1, 7, 10)
GENEROUS = 64  # times the tokens of the blocks' sequence: more than any family's pass takes at once


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rank: int | None = None
) -> Memory:
    """What a job holds at the peak of each stage, when all networks that it uses are loaded. rank: on this rank; None:
    on the one that takes the most."""
    last = math.prod(arrangement.plan.degrees) - 1
    ranks = {0, last} if rank is None else [rank]  # the others hold as much as one of these, or less
    jobs = (_Rank(model, video, arrangement, machine, one) for one in ranks)
    return max((Memory(one.device(), one.host()) for one in jobs), key=lambda one: one.device_peak)


def vae_bytes(model: Model, video: Video, arrangement: Arrangement, kind: str, work: str) -> int:
    """Bytes of a device of this kind that the VAE takes besides weights, to "decode" the video or to "encode" it."""
    ranks = math.prod(arrangement.plan.degrees)
    return int(getattr(MARGINS[kind], work) * tile_bytes(model, video, ranks, arrangement.tiles, work))


def roughly(model: Model, video: Video, arrangement: Arrangement, machine: Machine) -> Memory:
    """As `predicted`, without accelerators, and with a pass by the number of its tokens, generously: for jobs so small
    that they fit anywhere, as the dry run of a pass takes longer than they do."""
    one = _RoughRank(model, video, arrangement, machine, rank=0)
    return Memory(one.device(), one.host())


@dataclass(frozen=True)
class _Rank:
    """One rank's part of a job."""

    model: Model
    video: Video
    arrangement: Arrangement
    machine: Machine
    rank: int

    @property
    def on_cpu(self) -> bool:
        return self.machine.kind == "cpu"

    @property
    def ranks(self) -> int:
        return math.prod(self.arrangement.plan.degrees)

    def device(self) -> Mapping[str, Mapping[str, int]]:
        standing = {"weights": self.weights(), "loras": self._loras(), "communicators": self._communicators()}
        if self.arrangement.encoder == "ranks":
            standing["text encoder"] = self._encoder(Share(shards=self.ranks, shard=self.rank))
        if self.model.vae is not None:
            standing["vae"] = on_device(kept(self.model.vae, NO_RULES, self.model.vae_dtype), self.machine.kind)
        kind, tiles = self.machine.kind, {}
        if self.model.vae is not None:
            tiles = {"tiles": vae_bytes(self.model, self.video, self.arrangement, kind, "decode")}
        return {"encode": standing, "denoise": standing | self.denoise(), "decode": standing | tiles}

    def weights(self) -> int:
        """Of the experts. Those in turns are copies of what waits on the host, also on a CPU."""
        if self.arrangement.experts == "swap":
            return max(sum(one.nbytes for one in parts.values()) for parts in self._experts())
        return sum(on_device(parts, self.machine.kind) for parts in self._experts())

    def _loras(self) -> int:
        """What LoRAs take next to quantized weights, at most: a rank keeps a slice of it, and merges the rest."""
        model = self.model
        quantized = self.arrangement.packed or any(one.quantized for one in model.experts)
        return ITEMSIZES[model.dtype] * model.lora_numbers if quantized else 0

    def denoise(self) -> dict[str, int]:
        """What a step's passes take besides weights."""
        model, video, arrangement = self.model, self.video, self.arrangement
        one = pass_bytes(model, video, arrangement, self.machine.kind, self.rank)
        outputs = outputs_kept(video.acceleration, _blocks(model), own_branches(video, arrangement))
        return {
            "pass": int(MARGINS[self.machine.kind].blocks * one.blocks),
            "exchange": one.exchange,
            "context": one.context,
            "caches": outputs * one.output,
            "gathered": self._gathered(),
            "latents": self._latents() if self.on_cpu else 0,
            "libraries": MARGINS[self.machine.kind].libraries,
        }

    def host(self) -> Mapping[str, int]:
        """Of all ranks of a host together. On a CPU, without what is counted as a device's. Each host has memory for
        all frames, as a page of it has pixels of several tiles."""
        batch, _, frames, height, width = self.video.shape
        form = self.model.family.form(self.model.experts[0].config)
        ranks = self.machine.host_ranks
        pixels = form.spatial**2 * height * width * (form.temporal * (frames - 1) + 1)
        host = {"frames": 3 * 4 * batch * pixels}
        if not self.on_cpu:
            host["latents"] = ranks * self._latents()
        if self.arrangement.encoder == "cpu":
            host["text encoder"] = self._encoder(Share())
        if self.arrangement.experts == "swap":
            host["experts"] = ranks * self._slabs()
        return host

    @property
    def _share(self) -> Share:
        return Share.of(self.arrangement, self.rank)

    def _gathered(self) -> int:
        """By FSDP."""
        arrangement, shards = self.arrangement, self._share.shards
        network = network_of(self.model, arrangement.plan.tp, arrangement.packed)
        return gathered_bytes(network, shards) if shards > 1 else 0

    def _experts(self) -> Iterator[Mapping[str, OwnPart]]:
        model = self.model
        return (kept(one, rules_of(model, one), model.dtype, self._share) for one in model.experts)

    def _encoder(self, share: Share) -> int:
        model = self.model
        return sum(on_device(kept(one, NO_RULES, model.text_dtype, share), self.machine.kind) for one in model.encoders)

    def _communicators(self) -> int:
        """The world's, and one for each axis that is neither trivial nor the world; FSDP has one of its own."""
        degrees = [degree for degree in self.arrangement.plan.degrees if degree > 1]
        axes = len(degrees) if len(degrees) > 1 else 0
        number = 0 if self.ranks == 1 else 1 + axes + self.arrangement.fsdp
        return number * self.machine.communicator

    def _latents(self) -> int:
        """On the host during a pass: the solver's, and the velocity of another branch."""
        steps = len(self.video.passes[self.video.computed])
        held = LATENTS_HELD[min(steps, len(LATENTS_HELD)) - 1]
        return (held + own_branches(self.video, self.arrangement) - 1) * 4 * math.prod(self.video.shape)

    def _slabs(self) -> int:
        """Of both experts on one rank. Pages of a CPU's slab that hold no tensor are never touched."""
        sizes = {(number, name): one.nbytes
                 for number, parts in enumerate(self._experts()) for name, one in parts.items()}  # fmt: skip
        return sum(sizes.values()) if self.on_cpu else slabs_of(sizes).nbytes


class _RoughRank(_Rank):
    def denoise(self) -> dict[str, int]:
        family, config, plan = self.model.family, self.model.experts[0].config, self.arrangement.plan
        tokens, text = math.prod(family.grid(config, self.video.shape[2:])), self.video.text_tokens
        on_rank = -(-(tokens + family.text_in_sequence(config, text)) // (plan.ring * plan.ulysses))
        numbers = self.video.shape[0] * (on_rank + text) * family.width(config)
        latents = self._latents() if self.on_cpu else 0
        taken, libraries = GENEROUS * ITEMSIZES[self.model.dtype] * numbers, MARGINS[self.machine.kind].libraries
        return {"pass": taken, "latents": latents, "libraries": libraries}


def _blocks(model: Model) -> int:
    """The number of a network's blocks, of all kinds."""
    network: Network = model.experts[0]
    return sum(count(network.shapes, prefix) for prefix in model.family.parts[network.part].blocks)
