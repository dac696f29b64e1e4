"""The Wan VAE in each dtype on one rank of a device: the embedded one's frames against a CPU's in fp32, and the time of
one in full width with random weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from ascend_runtime import ParallelSpec, Runtime, VaeSpec, VideoSize

from ..report import Notes, Row, context_of
from .machine import ROOT, Cards
from .workloads import start_image

EMBEDDED = str(ROOT / "assets" / "tiny_wan")
CLIP = VideoSize(width=64, height=64, num_frames=9)
# dtype -> the least PSNR in dB of its frames. float32 may round the inputs of convolutions (HF32, TF32).
LEAST_PSNR = {"float32": 60.0, "bfloat16": 45.0, "float32_strict": 90.0}
BASE_DIM, QUICK_BASE_DIM = 96, 4  # Wan 2.1's width
LATENT, QUICK_LATENT = (1, 16, 5, 60, 104), (1, 16, 2, 8, 12)  # of 832 x 480 x 17, to measure time
ROUNDS = 3


def measure(cards: Cards, quick: bool, notes: Notes) -> Iterator[Row]:
    tiny = quick or cards.kind == "cpu"
    with tempfile.TemporaryDirectory() as folder, notes.noted("VAE"):
        torch.manual_seed(0)
        AutoencoderKLWan(base_dim=QUICK_BASE_DIM if tiny else BASE_DIM).save_pretrained(Path(folder) / "vae")
        with Runtime(ParallelSpec(ranks=1), device="cpu") as cpu:
            exact = VaeSpec(path=EMBEDDED, dtype="float32")
            latent = cpu.encode_video(exact, clip()).tensor.clone()
            frames = cpu.decode(exact, latent).tensor.clone()
        with Runtime(ParallelSpec(ranks=1), device=cards.kind) as runtime:
            bench = Bench(runtime, folder, torch.zeros(QUICK_LATENT if tiny else LATENT), 1 if quick else ROUNDS)
            yield from _rows(bench, latent, frames, cards, quick, notes)


@dataclass(frozen=True)
class Bench:
    """The VAE in `folder` decodes `latent` several times; the fastest counts."""

    runtime: Runtime
    folder: str
    latent: Tensor
    rounds: int

    def seconds(self, dtype: str) -> float:
        vae = VaeSpec(path=self.folder, dtype=dtype)
        return min(self.runtime.decode(vae, self.latent).seconds["decode"] for _ in range(1 + self.rounds))


def _rows(bench: Bench, latent: Tensor, exact: Tensor, cards: Cards, quick: bool, notes: Notes) -> Iterator[Row]:
    seconds = {}
    for dtype, least in LEAST_PSNR.items():
        with notes.noted(f"VAE in {dtype}"):
            try:
                frames = bench.runtime.decode(VaeSpec(path=EMBEDDED, dtype=dtype), latent).tensor.clone()
            except ValueError as error:  # this device cannot
                notes.leave_out(f"VAE in {dtype}", error)
                continue
            context = context_of(quick, cards.kind, device_name=cards.name, latent=list(latent.shape))
            yield Row(name=f"ascend.vae_{dtype}_psnr", value=psnr(frames, exact), unit="dB", better="higher",
                      baseline=least, context=context)  # fmt: skip
            seconds[dtype] = bench.seconds(dtype)
            context |= {"latent": list(bench.latent.shape), "seconds": round(seconds[dtype], 4)}
            if dtype != "float32":
                yield Row(name=f"ascend.vae_{dtype}_time", value=seconds[dtype] / seconds["float32"], unit="ratio",
                          better="lower", baseline=1.0, context=context)  # fmt: skip


def clip() -> Tensor:
    """Frames [T, H, W, 3] in which the start image moves to the right."""
    return torch.stack([start_image(CLIP).roll(2 * number, dims=1) for number in range(CLIP.num_frames)])


def psnr(frames: Tensor, exact: Tensor) -> float:
    """In dB, of frames in 0..1; at most 150, where they are equal."""
    return float(-10 * torch.log10((frames - exact).double().square().mean().clamp(min=1e-15)))
