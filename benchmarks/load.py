"""Loading a checkpoint under FSDP on 1, 2 and 4 ranks: bytes read, peak memory, weights held by each rank.

All figures come from the kernel (proc(5)), for unmodified ranks, above the memory of the same ranks when idle. Idle
means after the same job with its weights freed, so that libraries loaded by the first job do not count as weights.
The ranks' malloc returns freed memory immediately (`memory.GIVES_BACK`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import psutil
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tqdm import tqdm

from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, SampleSpec, VideoSize
from ascend_runtime.models.wan.weights import keeps_fp32

from . import cold_load
from .memory import GIVES_BACK, highest_rss, pss, rss
from .report import Row, context_of

RANKS = (1, 2, 4)
DTYPE = torch.bfloat16
# the width of Wan 1.3B, with as many blocks as make 4 GB
WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096, "num_layers": 42}
QUICK_WIDTHS = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 2048, "text_dim": 256, "num_layers": 12}
SIZE = VideoSize(width=64, height=64, num_frames=5)
TOKENS = 16  # of text
POLL = 0.05  # seconds


def run(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _write(Path(folder) / "checkpoint", QUICK_WIDTHS if quick else WIDTHS)
        step_bytes = 0
        for ranks in tqdm(RANKS, desc="groups of ranks"):
            measured = _measure(checkpoint, ranks)
            if ranks == 1:  # without communication
                step_bytes = measured.held[0] - measured.kept[0]
            yield from _figures(measured, step_bytes, checkpoint, ranks, quick)
        yield from cold_load.run(_spec(checkpoint), sorted(checkpoint.path.rglob("*.safetensors")), quick)


# The checkpoint


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    text_dim: int
    nbytes: int  # of all tensors
    block: int  # bytes of one block


def _write(folder: Path, widths: dict[str, int]) -> Checkpoint:
    """A diffusers folder with a transformer of random weights, in the dtypes in which ranks keep them."""
    with torch.device("meta"):
        network = WanTransformer3DModel(**widths)
    dtypes = {name: torch.float32 if keeps_fp32(name) else DTYPE for name in network.state_dict()}
    sizes = {name: x.numel() * dtypes[name].itemsize for name, x in network.state_dict().items()}
    total = sum(sizes.values())
    _check_room(folder.parent, total)
    component = folder / "transformer"
    component.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    network.save_config(component)
    tensors = {name: torch.randn(x.shape, dtype=dtypes[name]) * 0.02 for name, x in network.state_dict().items()}
    save_file(tensors, component / "diffusion_pytorch_model.safetensors")
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0."))
    return Checkpoint(folder, widths["text_dim"], total, block)


def _check_room(folder: Path, nbytes: int) -> None:
    disk, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if min(disk / 1.2, memory / 2) < nbytes:
        raise SystemExit(
            f"load: a checkpoint of {nbytes / 1e9:.1f} GB needs 1.2 x as much on the disk of {folder} (free: "
            f"{disk / 1e9:.1f} GB; TMPDIR names another) and 2 x as much memory (free: {memory / 1e9:.1f} GB)."
        )


# Measurements on a group of ranks


@dataclass(frozen=True)
class Measured:
    """Bytes. read: of the checkpoint, a rank; loading: PSS at most, all ranks together; kept, held: RSS of a rank when
    all is loaded, and at most within a step after that. Memory is above that of the idle ranks."""

    read: list[int]
    loading: int
    kept: list[int]
    held: list[int]
    seconds: float


def _measure(checkpoint: Checkpoint, ranks: int) -> Measured:
    parallel = ParallelSpec(ranks=ranks, fsdp=True)
    with Runtime(parallel, device="cpu", environment=GIVES_BACK) as runtime:
        _sample(runtime, checkpoint)
        runtime.free()
        idle, idle_rss = sum(map(pss, runtime.pids)), list(map(rss, runtime.pids))
        read_before = list(map(_read_calls, runtime.pids))
        with _peak(runtime.pids) as loading:
            start = time.perf_counter()
            runtime.load(model=_spec(checkpoint), parallel=parallel)
            seconds = time.perf_counter() - start
        read = [_read_calls(pid) - before + _mapped(pid, checkpoint.path)
                for pid, before in zip(runtime.pids, read_before)]  # fmt: skip
        if sum(read) < 0.99 * checkpoint.nbytes:
            raise RuntimeError(f"The ranks read {sum(read)} of {checkpoint.nbytes} bytes: some reading went unseen.")
        kept = [rss(pid) - before for pid, before in zip(runtime.pids, idle_rss)]
        with highest_rss(runtime.pids) as highest:
            _sample(runtime, checkpoint)
        held = [highest[pid] - before for pid, before in zip(runtime.pids, idle_rss)]
    return Measured(read, loading.most - idle, kept, held, seconds)


def _spec(checkpoint: Checkpoint) -> DiffusionModelSpec:
    return DiffusionModelSpec(path=str(checkpoint.path), dtype=str(DTYPE).removeprefix("torch."))


def _sample(runtime: Runtime, checkpoint: Checkpoint) -> None:
    """One step of a video so small that its memory is negligible."""
    spec = SampleSpec(steps=1, guidance_scale=1.0, solver="euler")
    text = torch.randn(1, TOKENS, checkpoint.text_dim)
    runtime.sample(_spec(checkpoint), spec, torch.zeros(SIZE.latent_shape()), text)


def _read_calls(pid: int) -> int:
    """Bytes that read calls returned to a process, whether from disk or from the page cache."""
    return int(re.search(r"^rchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)[1])


def _mapped(pid: int, folder: Path) -> int:
    """Bytes of the folder's files that a process has mapped and touched, which read calls do not count."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = f" {folder}/" in line
        elif counts and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@dataclass
class Peak:
    """The peak of the sum of PSS."""

    most: int = 0


@contextmanager
def _peak(pids: list[int]) -> Iterator[Peak]:
    """Samples every POLL seconds, and once at the end."""
    peak, ended = Peak(), threading.Event()

    def look() -> None:
        peak.most = max(peak.most, sum(map(pss, pids)))

    def watch() -> None:
        while not ended.wait(POLL):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
    look()


def _figures(measured: Measured, step_bytes: int, checkpoint: Checkpoint, ranks: int, quick: bool) -> Iterator[Row]:
    """step_bytes: memory that a step takes besides weights."""
    whole, blocks = checkpoint.nbytes, 2 * checkpoint.block / checkpoint.nbytes
    context = context_of(
        quick,
        ranks=ranks,
        checkpoint_gb=round(whole / 1e9, 3),
        two_blocks=round(blocks, 4),
        seconds=round(measured.seconds, 2),
        mb_s=round(whole / 1e6 / measured.seconds),
        kept=round(max(measured.kept) / whole, 4),
        files="in the page cache, as they were just written",
    )
    figures = (
        ("read_share", max(measured.read) / whole, 1 / ranks + 0.01, "bytes of read calls, and of mapped pages"),
        ("pss_ratio", measured.loading / whole, 1.1, "highest sum of PSS while loading, above idle"),
        ("rank_weights", (max(measured.held) - step_bytes) / whole, 1 / ranks + blocks,
         f"highest RSS within a step, above idle, without the {step_bytes / 1e6:.1f} MB that it takes besides weights"),
    )  # fmt: skip
    for name, value, bar, measure in figures:
        yield Row(name=f"load.{name}.{ranks}", value=value, unit="share", better="lower", baseline=bar,
                  context={**context, "measure": measure})  # fmt: skip
