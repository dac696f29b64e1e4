"""VAE decoding and encoding on two ranks against one: seconds, and memory of a rank; and one rank against diffusers.

A VAE of Wan 2.1's architecture with reduced width decodes and encodes a video of 832 x 480 x 17 (a latent of
60 x 104 x 5) on one rank and on two in turns, with one thread each. Two cores share resources such as memory bandwidth:
two ranks that each decode their own video, at the same time and one by one, show how much that costs.

And what bfloat16, an NPU's default, costs in PSNR: the VAEs of Wan 2.1 and of HunyuanVideo in full width with random
weights, with torch's operators and in an NPU's way (computed here, not on a device). A trained VAE differs less.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Iterator

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn
from tqdm import tqdm

from ascend_runtime import ParallelSpec, Runtime, VaeSpec
from ascend_runtime.models.registry import family
from ascend_runtime.models.shared.vae import VideoVae
from ascend_runtime.ops import OPERATORS_VARIABLE
from ascend_runtime.parallel.tiles import single_tile

from .memory import highest_rss, rss
from .report import Row, context_of

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CHANNELS, PIXELS = 16, 8
SIZE, QUICK_SIZE = (5, 60, 104), (2, 8, 12)  # latent frames, height, width
BASE_DIM, QUICK_BASE_DIM = 8, 4
ROUNDS, QUICK_ROUNDS = 3, 1
FULL_BASE_DIM, ROUNDED_SIZE = 96, (2, 6, 6)  # for PSNR
HUNYUAN_CHANNELS, QUICK_HUNYUAN_CHANNELS = (128, 256, 512, 512), (32, 32, 64, 64)
WAYS = {"torch": "bf16_psnr", "npu": "bf16_psnr_npu"}  # whose operators: the end of the row's name


def run(quick: bool) -> Iterator[Row]:
    size, rounds = (QUICK_SIZE, QUICK_ROUNDS) if quick else (SIZE, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _write(Path(folder), QUICK_BASE_DIM if quick else BASE_DIM)
        with (
            Runtime(ParallelSpec(ranks=1), device="cpu", environment=ONE_THREAD) as one,
            Runtime(ParallelSpec(ranks=1), device="cpu", environment=ONE_THREAD) as another,
            Runtime(ParallelSpec(ranks=2), device="cpu", environment=ONE_THREAD) as two,
        ):
            makers = {
                "1": lambda: _decode(one, folder, size),
                "2": lambda: _decode(two, folder, size),
                "apart": lambda: _at_once([one, another], folder, size),
                "encode 1": lambda: _encode(one, folder, size),
                "encode 2": lambda: _encode(two, folder, size),
            }
            seconds = {name: [] for name in makers}
            for make in makers.values():
                make()  # loads, and warms the libraries' caches
            for _ in tqdm(range(rounds), desc="videos"):
                for name, make in makers.items():
                    seconds[name].append(make())
            seconds["diffusers"] = [_by_diffusers(theirs, size)]
            peaks = [_peak(runtime, folder, size) for runtime in (one, two)]
    yield from _figures(seconds, peaks, quick, size)
    yield from _rounding(quick)


def _write(folder: Path, base_dim: int) -> AutoencoderKLWan:
    """A diffusers folder with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=base_dim).eval()
    vae.save_pretrained(folder / "vae")
    return vae


def _decode(runtime: Runtime, folder: str, size: tuple[int, int, int]) -> float:
    """Seconds of the slowest rank."""
    return runtime.decode(VaeSpec(path=folder), torch.zeros(1, CHANNELS, *size)).seconds["decode"]


def _at_once(runtimes: list[Runtime], folder: str, size: tuple[int, int, int]) -> float:
    """Seconds of the slowest rank, each with its own video."""
    with ThreadPoolExecutor(len(runtimes)) as threads:
        return max(threads.map(lambda runtime: _decode(runtime, folder, size), runtimes))


def _encode(runtime: Runtime, folder: str, size: tuple[int, int, int]) -> float:
    frames, height, width = size
    video = torch.zeros(4 * frames - 3, PIXELS * height, PIXELS * width, 3)
    return runtime.encode_video(VaeSpec(path=folder), video).seconds["encode"]


@torch.no_grad()
def _by_diffusers(vae: AutoencoderKLWan, size: tuple[int, int, int]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    vae.decode(torch.zeros(1, CHANNELS, *size))
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


def _peak(runtime: Runtime, folder: str, size: tuple[int, int, int]) -> int:
    """The RSS in bytes of the largest rank during decoding, including its tile of the frames, above the RSS of the idle
    rank with the VAE loaded."""
    before = {pid: rss(pid) for pid in runtime.pids}
    with highest_rss(runtime.pids) as highest:
        _decode(runtime, folder, size)
    return max(highest[pid] - before[pid] for pid in before)


def _figures(seconds: dict[str, list[float]], peaks: list[int], quick: bool, size) -> Iterator[Row]:
    def ratio(one: str, other: str) -> float:
        """The seconds of runs in turns; diffusers, which takes long, runs once at the end."""
        return median(a / b for a, b in zip(reversed(seconds[one]), reversed(seconds[other])))

    context = context_of(quick, threads_a_rank=1, latent=list(size), base_dim=QUICK_BASE_DIM if quick else BASE_DIM,
                         rounds=len(seconds["1"]),
                         seconds={name: round(median(of), 3) for name, of in seconds.items()},
                         peaks_mb=[round(peak / 1e6) for peak in peaks])  # fmt: skip
    yield Row(name="vae.speedup2", value=ratio("1", "2"), unit="x", better="higher", baseline=1.85, context=context)
    yield Row(name="vae.of_machine2", value=ratio("apart", "2") / 2, unit="x", better="higher", baseline=0.925,
              context=context)  # fmt: skip
    yield Row(name="vae.encode_speedup2", value=ratio("encode 1", "encode 2"), unit="x", better="higher",
              baseline=1.85, context=context)  # fmt: skip
    yield Row(name="vae.peak_ratio2", value=peaks[1] / peaks[0], unit="x", better="lower", baseline=0.6,
              context=context)  # fmt: skip
    yield Row(name="vae.vs_diffusers1", value=ratio("1", "diffusers"), unit="x", better="lower", baseline=1.0,
              context=context)  # fmt: skip


def _rounding(quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    base_dim = QUICK_BASE_DIM if quick else FULL_BASE_DIM
    yield from _rounded("vae.", "wan", AutoencoderKLWan(base_dim=base_dim), context_of(quick, base_dim=base_dim))
    channels = QUICK_HUNYUAN_CHANNELS if quick else HUNYUAN_CHANNELS
    network = AutoencoderKLHunyuanVideo(block_out_channels=channels)
    yield from _rounded("vae.hunyuan_video_", "hunyuan_video", network, context_of(quick, channels=list(channels)))


def _rounded(prefix: str, name: str, network: nn.Module, context: dict) -> Iterator[Row]:
    """The rows of a VAE of family `name`, which are named with this prefix."""
    vae = family(name).vae(_with_variance(network.eval()), family(name).vae_form(network.config))
    latent = torch.randn(CHANNELS, *ROUNDED_SIZE)
    exact = _frames(vae, latent)
    nn.Module.to(network, torch.bfloat16)
    context |= {"latent": list(ROUNDED_SIZE), "weights": "random", "reference": "float32",
                "std": round(float(exact.std()), 3)}  # fmt: skip
    for way, end in WAYS.items():
        before = os.environ.get(OPERATORS_VARIABLE, "")
        os.environ[OPERATORS_VARIABLE] = way
        error = (_frames(vae, latent) - exact).double().square().mean()
        os.environ[OPERATORS_VARIABLE] = before
        yield Row(name=f"{prefix}{end}", value=-10 * math.log10(error), unit="dB", better="higher", baseline=45,
                  context=context)  # fmt: skip


def _with_variance(vae: nn.Module) -> nn.Module:
    """Fills convolutions with random weights that keep the variance, so that the frames are not nearly gray."""
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim > 3:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return vae


@torch.no_grad()
def _frames(vae: VideoVae, latent: torch.Tensor) -> torch.Tensor:
    """Frames [3,T,H,W] in 0..1 of a latent [C,T,H,W]."""
    chunks = (latent.to(vae.dtype)[:, chunk] for chunk in vae.chunks(latent.shape[1]))
    made = vae.decoded(chunks, single_tile(*latent.shape[2:]))
    return torch.cat([frames.float() for frames in made if frames is not None], dim=1) / 2 + 0.5
