"""Jobs that take memory of ranks, and what the planner predicts for them.

Networks are wide and short, so that much memory comes with few FLOPs.
"""

import json
import math
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import random_hunyuan
import tiny_models
import torch
from ascend_runtime import (
    AccelerationSpec,
    AttentionCacheSpec,
    BlockCacheSpec,
    Conditioning,
    DiffusionModelSpec,
    ParallelSpec,
    SampleSpec,
    StepCacheSpec,
    VaeSpec,
)
from ascend_runtime.planner import exchange, memory, models
from ascend_runtime.planner.facts import Arrangement, Machine, Model, Video
from ascend_runtime.specs import Plan
from ascend_runtime.specs.plans import AXES
from benchmarks.memory import highest_rss, rss

MB = 2**20
TEXT_TOKENS = 16
WAN = {  # by name: what is in a transformer's config
    "feed": {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 8192, "num_layers": 1},
    "heads": {"num_attention_heads": 8, "attention_head_dim": 24, "ffn_dim": 192, "num_layers": 1},
    "pair": {"num_attention_heads": 8, "attention_head_dim": 24, "ffn_dim": 192, "num_layers": 2},
    "deep": {"num_attention_heads": 8, "attention_head_dim": 24, "ffn_dim": 192, "num_layers": 5},
    "fat": {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 32768, "num_layers": 5},
    "fatter": {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 61440, "num_layers": 5},
    "fat 2": {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 20480, "num_layers": 3},
}
HUNYUAN = {
    "joint": {"num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1},
    "joint fat": {"num_attention_heads": 32, "attention_head_dim": 16, "num_layers": 6, "num_single_layers": 14},
}


@dataclass(frozen=True)
class Job:
    """kind: "sample", "decode" or "encode". shape: of the latent [B,C,T,H,W]. experts: of the model."""

    name: str
    model: str
    shape: tuple[int, ...]
    plan: Plan = Plan()
    kind: str = "sample"
    steps: int = 1
    guidance: float = 1.0
    spec: dict = field(default_factory=dict)
    parallel: dict = field(default_factory=dict)
    acceleration: AccelerationSpec = AccelerationSpec()
    tiles: str = "whole"

    @property
    def ranks(self) -> int:
        return math.prod(self.plan.degrees)


def heads(batch: int) -> tuple[int, ...]:
    return batch, 16, 1, 48, 40


def joint(batch: int) -> tuple[int, ...]:
    return batch, 16, 2, 48, 40


def feed(frames: int) -> tuple[int, ...]:
    return 1, 16, frames, 64, 80


U2, R2, T2, C2 = Plan(ulysses=2), Plan(ring=2), Plan(tp=2), Plan(cfg=2)
SAMPLE = [  # what CI runs, all on two ranks
    Job("a feed-forward, on two ranks of guidance", "feed", feed(4), C2, guidance=5.0),
    Job("exchanges of Ulysses", "heads", heads(120), U2),
    Job("a gathered ring of HunyuanVideo's tokens", "joint", joint(112), R2, parallel={"ring_exchange": "gather"}),
    Job("slices of weights", "heads", heads(140), T2),
    Job("a decoded video", "feed", (1, 16, 3, 96, 128), U2, kind="decode"),
]
REST = [
    Job("a feed-forward", "feed", feed(4)),
    Job("a feed-forward with guidance", "feed", feed(4), steps=2, guidance=5.0),
    Job("a batch", "heads", heads(120)),
    Job("HunyuanVideo", "joint", joint(66)),
    Job("AttentionCache", "deep", heads(48), steps=4, guidance=5.0,
        acceleration=AccelerationSpec(attention_cache=AttentionCacheSpec(start=0, end=5, interval=2))),
    Job("TaylorSeer", "heads", heads(56), steps=5, guidance=5.0,
        acceleration=AccelerationSpec(step_cache=StepCacheSpec(method="taylorseer", order=2, interval=2))),
    Job("the first-block cache", "pair", heads(64), steps=2, guidance=5.0,
        acceleration=AccelerationSpec(step_cache=StepCacheSpec(method="fbcache", threshold=0.0))),
    Job("the block cache", "heads", heads(84), steps=3, guidance=5.0,
        acceleration=AccelerationSpec(block_cache=BlockCacheSpec(start=0, end=5, interval=2))),
    Job("weights in 8 bits", "fat", feed(1), spec={"quantization": "w8a8_dynamic"}),
    Job("weights in bfloat16", "fatter", (1, 16, 1, 16, 16), spec={"dtype": "bfloat16"}),
    Job("a video decoded on one rank", "feed", (1, 16, 3, 64, 96), kind="decode"),
    Job("a video encoded on one rank", "feed", (1, 16, 3, 64, 96), kind="encode"),
    Job("HunyuanVideo's VAE", "joint", (1, 16, 4, 36, 36), kind="decode"),
    Job("experts in turns", "fat 2", (1, 16, 1, 16, 16), spec={"experts": "swap"}),
    Job("Ulysses with overlap", "heads", heads(144), U2, parallel={"overlap": True}),
    Job("a ring", "heads", heads(188), R2),
    Job("a gathered ring", "heads", heads(150), R2, parallel={"ring_exchange": "gather"}),
    Job("HunyuanVideo on Ulysses", "joint", joint(92), U2),
    Job("HunyuanVideo in slices", "joint", joint(104), T2),
    Job("FSDP", "fat", (1, 16, 1, 16, 16), U2, parallel={"fsdp": True}),
    Job("FSDP of HunyuanVideo", "joint fat", (1, 16, 1, 16, 16), C2, guidance=5.0, parallel={"fsdp": True}),
    Job("an encoded video", "feed", (1, 16, 3, 96, 128), U2, kind="encode"),
    Job("Ulysses and guidance", "heads", heads(120), Plan(cfg=2, ulysses=2), guidance=5.0),
    Job("Ulysses and a ring", "heads", heads(240), Plan(ring=2, ulysses=2)),
    Job("Ulysses in slices", "heads", heads(170), Plan(ulysses=2, tp=2)),
]  # fmt: skip


class Models:
    """Models on disk, each written when it is first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, name: str, experts: int = 1) -> str:
        folder = self._folder / f"{name} {experts}".replace(" ", "_")
        if not folder.exists():
            self._write(folder, name, experts)
        return str(folder)

    def _write(self, folder: Path, name: str, experts: int) -> None:
        is_wan = name in WAN
        make = tiny_models.wan_transformer if is_wan else random_hunyuan.transformer
        for number in range(experts):
            made = make(seed=number, **(WAN if is_wan else HUNYUAN)[name])
            made.save_pretrained(folder / ("transformer_2" if number else "transformer"))
        (tiny_models.wan_vae if is_wan else tiny_models.hunyuan_vae)().save_pretrained(folder / "vae")
        index = {"_class_name": "WanPipeline" if is_wan else "HunyuanVideoPipeline"}
        (folder / "model_index.json").write_text(json.dumps(index | ({"boundary_ratio": 0.9} if experts == 2 else {})))


def model_spec(job: Job, models_on_disk: Models) -> DiffusionModelSpec:
    experts = 2 if "experts" in job.spec else 1
    return DiffusionModelSpec(path=models_on_disk(job.model, experts), **job.spec)


def parallel_spec(job: Job) -> ParallelSpec:
    degrees = {f"{axis}_degree": getattr(job.plan, axis) for axis in AXES}
    return ParallelSpec(ranks=job.ranks, **degrees, **{"fsdp": False, **job.parallel})


def run(runtime, job: Job, models_on_disk: Models, shape: tuple[int, ...] | None = None) -> None:
    shape = shape or job.shape
    spec = model_spec(job, models_on_disk)
    vae = VaeSpec(path=spec.path, tiles=job.tiles)
    if job.kind == "decode":
        runtime.decode(vae, torch.zeros(shape))
    elif job.kind == "encode":
        _, _, frames, height, width = shape
        runtime.encode_video(vae, torch.zeros(4 * frames - 3, 8 * height, 8 * width, 3))
    else:
        sample = SampleSpec(steps=job.steps, guidance_scale=job.guidance, solver="unipc")
        prompts = [_prompt(job)] * (2 if job.guidance != 1.0 else 1)
        runtime.sample(
            spec, sample, torch.zeros(shape), *prompts, parallel=parallel_spec(job), acceleration=job.acceleration
        )


def _prompt(job: Job) -> Conditioning:
    if job.model in WAN:
        return Conditioning(text=torch.randn(1, TEXT_TOKENS, tiny_models.TEXT_DIM))
    text = torch.randn(1, TEXT_TOKENS, random_hunyuan.TEXT_DIM)
    return Conditioning(text=text, pooled=torch.randn(1, random_hunyuan.POOLED_DIM))


def facts(job: Job, models_on_disk: Models) -> tuple[Model, Video, Arrangement]:
    """What predictions for the job are about."""
    spec = model_spec(job, models_on_disk)
    model = models.read(spec, vae=VaeSpec(path=spec.path), kind="cpu")
    passes = ((0, 2 if job.guidance != 1.0 else 1),) * job.steps
    video = Video(job.shape, passes, TEXT_TOKENS, acceleration=job.acceleration)
    experts = spec.experts if len(model.experts) == 2 else "resident"
    parallel = {"fsdp": False, **job.parallel}
    return model, video, Arrangement(job.plan, experts=experts, tiles=job.tiles, **parallel)


def by_chance(job: Job, models_on_disk: Models) -> int:
    """Bytes of the prediction that a rank takes in some runs only. A gathered ring gathers keys and values in two
    threads, each with a buffer of Gloo's that is filled, copied and freed. Their messages go over one connection: the
    keys arrive first. Their buffer is free before the values are copied, unless its thread has to wait for a core."""
    if job.parallel.get("ring_exchange") != "gather":
        return 0
    found = exchange.exchanges(exchange.step_of(*facts(job, models_on_disk)))
    (gathers,) = (one for one in found if (one.axis, one.operation) == ("ring", "all_gather"))
    return gathers.sent // gathers.times * job.plan.ring // (job.plan.ring - 1)


def predicted(job: Job, models_on_disk: Models, rank: int) -> dict[str, int]:
    """The parts that the job takes of a rank above an idle one, at most."""
    model, video, arrangement = facts(job, models_on_disk)
    found = memory.predicted(model, video, arrangement, Machine("cpu", "cpu", job.ranks, 2**40, 2**40), rank)
    if job.kind != "sample":  # no transformer is loaded
        return {"tiles": memory.vae_bytes(model, video, arrangement, "cpu", job.kind)}
    parts = dict(found.device["denoise"])
    return parts | {"experts on the host": found.host.get("experts", 0) // job.ranks}


# What is taken


@contextmanager
def watched(pids):
    """The most anonymous memory of each process within the block, available after it: what was seen, or the peak of all
    memory without mapped files and shared memory, whichever is more."""
    anonymous, mapped, ended = dict.fromkeys(pids, 0), dict.fromkeys(pids, 0), threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            for pid in pids:
                anonymous[pid] = max(anonymous[pid], rss(pid, "RssAnon"))
                mapped[pid] = max(mapped[pid], rss(pid, "RssFile") + rss(pid, "RssShmem"))

    watching = threading.Thread(target=look)
    with highest_rss(pids) as highest:
        watching.start()
        try:
            yield anonymous
        finally:
            ended.set()
            watching.join()
    anonymous.update({pid: max(anonymous[pid], highest[pid] - mapped[pid]) for pid in pids})


def taken(runtime, work: Callable[[], None]) -> list[int]:
    """Bytes of each rank above what it had before."""
    idle = {pid: rss(pid, "RssAnon") for pid in runtime.pids}
    with watched(runtime.pids) as highest:
        work()
    return [highest[pid] - idle[pid] for pid in runtime.pids]
