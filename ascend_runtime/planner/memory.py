"""Predicts the bytes that a job holds on devices and on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .facts import Arrangement, Machine, Memory, Model, Network, Video
from .passes import pass_bytes, question_of
from .weights import NO_RULES, Share, kept, on_device, rules_of

KERNELS = {"cpu": 1.05, "npu": 1.2, "cuda": 1.2}


def predicted(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rank: int | None = None
) -> Memory:
    """What a job holds at the peak of each stage. rank: on this rank; None: on the one that takes the most."""
    last = math.prod(arrangement.plan.degrees) - 1
    ranks = {0, last} if rank is None else [rank]  # the others hold as much as one of these, or less
    return max((_on_rank(model, video, arrangement, machine, one) for one in ranks), key=lambda one: one.device_peak)


def _on_rank(model: Model, video: Video, arrangement: Arrangement, machine: Machine, rank: int) -> Memory:
    share = Share.of(arrangement, rank)
    standing = {"weights": _weights(model, arrangement, machine.kind, share), "communicators": _communicators(machine)}
    encoder = _encoder(model, arrangement, machine, share)
    decoder = _whole(model.vae, model.vae_dtype, machine.kind) if model.vae else 0
    on_device = {"text encoder": encoder if arrangement.encoder == "ranks" else 0}
    device = {
        "encode": {**standing, **on_device},
        "denoise": {**standing, **on_device, "vae": decoder, **_denoise(model, video, arrangement, machine, rank)},
        "decode": {**standing, **on_device, "vae": decoder, **_decode(model, video, arrangement, machine)},
    }
    return Memory(device, _host(model, video, arrangement, machine, encoder))


def _weights(model: Model, arrangement: Arrangement, kind: str, share: Share) -> int:
    experts = model.experts[:1] if arrangement.experts == "swap" else model.experts
    if arrangement.experts == "swap":
        kind = "swap"  # a copy of what waits on the host, also on a CPU
    return sum(on_device(kept(one, rules_of(model, one), model.dtype, share), kind) for one in experts)


def _whole(network: Network, dtype: str, kind: str) -> int:
    return on_device(kept(network, NO_RULES, dtype), kind)


def _encoder(model: Model, arrangement: Arrangement, machine: Machine, share: Share) -> int:
    if arrangement.encoder == "ranks" and arrangement.fsdp:
        share = Share(shards=share.shards, shard=share.shard)
    else:
        share = Share()
    return sum(on_device(kept(one, NO_RULES, model.text_dtype, share), machine.kind) for one in model.encoders)


def _communicators(machine: Machine) -> int:
    return machine.communicator if machine.ranks > 1 else 0


def _denoise(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, rank: int
) -> Mapping[str, int]:
    one = pass_bytes(question_of(model, video, arrangement, machine.kind, rank))
    share = Share.of(arrangement, rank)
    return {
        "pass": int(KERNELS[machine.kind] * one.blocks),
        "exchange": one.exchange,
        "context": one.context,
        "gathered": _gathered(model, share) if share.shards > 1 else 0,
    }


def _gathered(model: Model, share: Share) -> int:
    network = model.experts[0]
    parts = kept(network, rules_of(model, network), model.dtype, share)
    blocks: dict[str, int] = {}
    for name, one in parts.items():
        if not rules_of(model, network).replicated(name):
            prefix = next((p for p in model.family.parts[network.part].blocks if name.startswith(p)), "")
            unit = prefix + name.removeprefix(prefix).split(".")[0] if prefix else ""
            blocks[unit] = blocks.get(unit, 0) + one.whole
    return blocks.pop("", 0) + 2 * max(blocks.values(), default=0)


def _decode(model: Model, video: Video, arrangement: Arrangement, machine: Machine) -> Mapping[str, int]:
    if model.vae is None:
        return {}
    from .vae_tiles import tile_bytes

    return {"tiles": int(KERNELS[machine.kind] * tile_bytes(model, video, arrangement, machine, "decode"))}


def _host(
    model: Model, video: Video, arrangement: Arrangement, machine: Machine, encoder: int
) -> Mapping[str, int]:
    form, (batch, _, frames, height, width) = model.family.form(model.experts[0].config), video.shape
    pixels = form.spatial**2 * height * width * (form.temporal * (frames - 1) + 1)
    host = {"frames": 12 * batch * pixels, "latents": 4 * 6 * math.prod(video.shape)}
    if arrangement.encoder == "cpu":
        host["text encoder"] = encoder
    if arrangement.experts == "swap":
        parts = (kept(one, rules_of(model, one), model.dtype) for one in model.experts)
        whole = sum(one.nbytes for expert in parts for one in expert.values())
        host["experts"] = machine.ranks * -(-whole // 2**29) * 2**29
    return host
