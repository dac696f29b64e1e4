"""Small transformers of all kinds, and what a sampler outside of the ranks gives them: for tests."""

from pathlib import Path
from typing import NamedTuple

import hunyuan_formats
import random_hunyuan
import random_wan
import torch
from ascend_runtime.models.shared.conditioning import Inputs
from safetensors.torch import save_file
from torch import Tensor

IMAGE = {"image": True}
WAN = {  # file: how it is made (random_wan.original_transformer)
    "t2v": {},
    "i2v 2.1": {"channels": 36, **IMAGE},
    "flf2v 2.1": {"channels": 36, "places": 514, **IMAGE},
    "i2v 2.2": {"channels": 36},
    "control 2.1": {"channels": 48, "reference": True, **IMAGE},
    "control 2.2": {"channels": 52, "reference": True},
    "5B": {"channels": 48, "out_channels": 48},
    "5B inpaint": {"channels": 100, "out_channels": 48},
    "5B control": {"channels": 148, "out_channels": 48, "reference": True},
}
HUNYUAN = {  # file: its kind in random_hunyuan, and changes of its config
    "hunyuan t2v": ("t2v", {}),
    "hunyuan unguided": ("t2v", {"guidance_embeds": False}),
    "hunyuan v1": ("i2v concat", {}),
}


class Case(NamedTuple):
    """file: the transformer. size: of the latent [T,H,W]. timesteps: [B], or [B,T]. inputs: their shapes, each without
    B, or the inputs."""

    file: str
    inputs: dict = {}
    size: tuple = (3, 6, 8)
    timesteps: list = [500.3]

    @property
    def wan(self) -> bool:
        return self.file in WAN

    @property
    def channels(self) -> int:
        return WAN[self.file].get("out_channels", 16) if self.wan else 16

    def drawn(self, seed: int) -> tuple[Tensor, Tensor, Inputs]:
        """(a latent, its timesteps, the inputs), random."""
        generator, batch = torch.Generator().manual_seed(seed), len(self.timesteps)
        given = {"text": (7, random_wan.TEXT_DIM if self.wan else random_hunyuan.TEXT_DIM)}
        if not self.wan:
            given |= {"y": (768,), "guidance": torch.tensor([6.0])}
        tensors = {
            name: x.expand(batch, *x.shape[1:]) if isinstance(x, Tensor) else
            torch.randn(batch, *x, generator=generator) for name, x in (given | self.inputs).items()
        }  # fmt: skip
        shape = (batch, self.channels, *self.size)
        return torch.randn(shape, generator=generator), torch.tensor(self.timesteps), Inputs(shape, tensors)


def concat(channels: int, size: tuple = (3, 6, 8)) -> dict:
    return {"concat": (channels, *size)}


CLIP, CLIP_TWICE, REFERENCE = ({"clip_fea": (257, 1280)}, {"clip_fea": (514, 1280)}, {"reference_latent": (16, 6, 8)})
REFERENCE_22, FURTHER = {"reference_latent": (48, 6, 8)}, {"time_dim_concat": (16, 2, 5, 8)}
GUIDED, MASK = {"guiding_frame_index": torch.tensor([0.0])}, {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 0]])}
CASES = {
    "text": Case("t2v"),
    "odd": Case("t2v", size=(3, 5, 7)),
    "batch": Case("t2v", timesteps=[400.0, 700.0]),
    "further frames, odd": Case("t2v", FURTHER, size=(3, 5, 8)),
    "image, 2.1": Case("i2v 2.1", concat(20) | CLIP),
    "image, 2.1, without CLIP": Case("i2v 2.1", concat(20)),
    "two images": Case("flf2v 2.1", concat(20) | CLIP_TWICE),
    "one of two images": Case("flf2v 2.1", concat(20) | CLIP, timesteps=[400.0, 700.0]),
    "image, 2.2, odd": Case("i2v 2.2", concat(20, (3, 5, 8)), size=(3, 5, 8)),
    "control, 2.1": Case("control 2.1", concat(32) | CLIP | REFERENCE),
    "control, 2.1, without reference": Case("control 2.1", concat(32) | CLIP),
    "control, 2.2": Case("control 2.2", concat(36) | REFERENCE, timesteps=[400.0, 700.0]),
    "5B": Case("5B"),
    "5B, a timestep a frame": Case("5B", timesteps=[[0.0, 500.0, 500.0]]),
    "5B, odd, a timestep a frame": Case("5B", size=(3, 5, 7), timesteps=[[0.0, 500.0, 250.0]]),
    "5B, inpaint": Case("5B inpaint", concat(52)),
    "5B, control": Case("5B control", concat(100) | REFERENCE_22),
    "5B, control, a timestep a frame": Case("5B control", concat(100) | REFERENCE_22, timesteps=[[0.0, 500.0, 250.0]]),
    "hunyuan": Case("hunyuan t2v"),
    "hunyuan, a mask": Case("hunyuan t2v", MASK),
    "hunyuan, batch": Case("hunyuan t2v", timesteps=[400.0, 700.0]),
    "hunyuan, unguided": Case("hunyuan unguided"),
    "hunyuan, v1": Case("hunyuan v1", concat(17)),
    "hunyuan, v2": Case("hunyuan t2v", GUIDED),
}


def write(folder: Path) -> list[str]:
    """Writes all transformers, as FILE.safetensors, with the names of ComfyUI's tensors; returns the files."""
    for seed, (file, kind) in enumerate(WAN.items()):
        random_wan.original_transformer(folder / f"{file}.safetensors", seed=seed, **kind)
    for seed, (file, (kind, changes)) in enumerate(HUNYUAN.items()):
        network = random_hunyuan.transformer(kind, seed, **random_hunyuan.AS_CORE, **changes)
        save_file(hunyuan_formats.comfyui_transformer(network.state_dict()), folder / f"{file}.safetensors")
    return [*WAN, *HUNYUAN]
