"""Each parallel mode against one rank: the speed-up of a step, and the error of the latent. On NPUs also how ranks that
shard weights by FSDP2 share memory between streams."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from ascend_runtime import Conditioning, DiffusionModelSpec, OperatorSpec, ParallelSpec, Runtime, SampleSpec, VideoSize
from ascend_runtime.hardware import host

from ..report import Notes, Row, context_of

FUSED = "_fused"  # ends the names of plans with OperatorSpec.fused_all_reduce
DEGREES = (2, 4, 8)  # of Ulysses, rings and slices of weights
EFFICIENCY = 0.85  # of the ideal speed-up; cann-recipes publishes 0.96 for Ulysses on eight A3 cards (HunyuanVideo)
# The allowed error: in fp32 on a CPU, that of the tests. In bfloat16, a ring's partial attentions are rounded before
# they are merged, and random weights amplify that: 0.026 on two and four ranks of a CPU.
LARGEST_DIFFERENCE = {"float32": 1e-4, "auto": 5e-2}
MEASURE = "largest |difference| from one rank's latent, divided by its largest |value|"


@dataclass(frozen=True)
class Job:
    """A transformer with random weights, and the video it makes. dtype: of its blocks, as in DiffusionModelSpec.

    text: the number of a prompt's tokens, and the channels of each. pooled: those of a prompt's pooled vector, if the
    transformer reads one. branches: of guidance. name: what the names of its figures begin with.
    """

    config: dict
    size: VideoSize
    steps: int
    dtype: str
    text: tuple[int, int]
    pooled: int | None = None
    branches: int = 2
    name: str = ""

    @property
    def blocks(self) -> int:
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    def prompts(self) -> list[Conditioning]:
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randn(1, *self.text, generator=generator) for _ in range(self.branches)]
        pooled = None if self.pooled is None else torch.randn(1, self.pooled, generator=generator)
        return [Conditioning(text=text, pooled=pooled) for text in texts]


WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
           "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 4, "patch_size": [1, 2, 2],
           "cross_attn_norm": True, "eps": 1e-6, "rope_max_seq_len": 1024,
           "_class_name": "WanTransformer3DModel"}  # fmt: skip
TEXT_TOKENS = 512
TINY = {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 32, "ffn_dim": 256}
HUNYUAN = {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
           "num_layers": 2, "num_single_layers": 4, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2,
           "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
           "rope_theta": 256.0, "rope_axes_dim": [16, 56, 56],
           "_class_name": "HunyuanVideoTransformer3DModel"}  # fmt: skip
TINY_HUNYUAN = {"num_attention_heads": 4, "attention_head_dim": 32, "rope_axes_dim": [8, 12, 12], "text_embed_dim": 64,
                "pooled_projection_dim": 32}  # fmt: skip
HUNYUAN_TEXT = 256


def job_for(kind: str, quick: bool) -> Job:
    if kind == "cpu":
        size, steps = _small(quick)
        return Job({**WAN_14B, **TINY}, size, steps, dtype="float32", text=(TEXT_TOKENS, TINY["text_dim"]))
    size = VideoSize(width=832, height=480, num_frames=17) if quick else VideoSize(width=1280, height=720)
    return Job(WAN_14B, size, steps=2 if quick else 6, dtype="auto", text=(TEXT_TOKENS, WAN_14B["text_dim"]))


def hunyuan_job_for(kind: str, quick: bool) -> Job:
    """HunyuanVideo's, whose text is a part of the sequence, with embedded guidance."""
    config, dtype, steps = HUNYUAN, "auto", 2 if quick else 3
    width, height, frames = (832, 480, 17) if quick else (1280, 720, 129)
    size = VideoSize(width=width, height=height, num_frames=frames)
    if kind == "cpu":
        config, dtype, (size, steps) = {**HUNYUAN, **TINY_HUNYUAN}, "float32", _small(quick)
    text, pooled = (HUNYUAN_TEXT, config["text_embed_dim"]), config["pooled_projection_dim"]
    return Job(config, size, steps, dtype, text, pooled, branches=1, name="hunyuan_")


def _small(quick: bool) -> tuple[VideoSize, int]:
    """(a size, steps) for a CPU."""
    side = 64 if quick else 128
    return VideoSize(width=side, height=side, num_frames=9), 2 if quick else 8


def plans(cards: int, fused: bool = False) -> dict[str, ParallelSpec]:
    """The plans for up to `cards` cards, by name, fewest cards first; the first has one card.

    fused: tensor parallelism also with the operator that multiplies and all-reduces."""
    found = {"one": _plan(), "cfg2": _plan(cfg=2)}
    for degree in DEGREES:
        found |= {
            f"ulysses{degree}": _plan(ulysses=degree),
            f"ulysses{degree}_overlap": _plan(ulysses=degree, overlap=True),
            f"ulysses{degree}_fsdp": _plan(ulysses=degree, fsdp=True),
            f"ring{degree}": _plan(ring=degree),
            f"ring{degree}_gather": _plan(ring=degree, ring_exchange="gather"),
            f"tp{degree}": _plan(tp=degree),
            **({f"tp{degree}{FUSED}": _plan(tp=degree)} if fused else {}),
            f"cfg2_ulysses{degree}": _plan(cfg=2, ulysses=degree),
        }
    return dict(sorted(((n, p) for n, p in found.items() if p.ranks <= cards), key=lambda item: item[1].ranks))


def unguided(found: dict[str, ParallelSpec]) -> dict[str, ParallelSpec]:
    """Of these plans, those for one branch of guidance, one of each kind."""
    return {name: plan for name, plan in found.items() if "_" not in name and plan.cfg_degree == 1}


def _plan(cfg: int = 1, ring: int = 1, ulysses: int = 1, tp: int = 1, **more) -> ParallelSpec:
    """A plan that leaves nothing to choose."""
    degrees = {"cfg_degree": cfg, "ring_degree": ring, "ulysses_degree": ulysses, "tp_degree": tp}
    return ParallelSpec(ranks=cfg * ring * ulysses * tp, **degrees, **{"overlap": False, "fsdp": False} | more)


def measure(kind: str, cards: int, quick: bool, notes: Notes) -> Iterator[Row]:
    found = plans(cards, fused=kind == "npu" and host.npu_line() in ("a2", None))
    if len(found) == 1:
        notes.leave_out("parallel modes", f"there is only one {kind} device")
    else:
        yield from _modes(kind, quick, job_for(kind, quick), found, notes)
        yield from _modes(kind, quick, hunyuan_job_for(kind, quick), unguided(found), notes)
    yield from memory_reuse(kind, cards, quick, notes)


def _modes(kind: str, quick: bool, job: Job, found: dict[str, ParallelSpec], notes: Notes) -> Iterator[Row]:
    one = None
    with tempfile.TemporaryDirectory() as folder:
        write_transformer(Path(folder), job)
        for ranks in sorted({plan.ranks for plan in found.values()}):
            with Runtime(ParallelSpec(ranks=ranks), device=kind) as runtime:
                for name in [name for name, plan in found.items() if plan.ranks == ranks]:
                    with notes.noted(f"parallel mode {job.name}{name}"):
                        operators = OperatorSpec(fused_all_reduce=name.endswith(FUSED))
                        made = _sample(runtime, folder, job, found[name], operators)
                        one = one or made
                        if made is not one:
                            yield from _rows(f"{job.name}{name}", kind, quick, job, found[name], made, one)
            if one is None:  # there is no baseline
                return


REUSE = "MULTI_STREAM_MEMORY_REUSE"
VALUES = ("1", "2", "3")  # 2 is the default of ranks that shard weights
WORSE = 1.05  # how much slower, or larger, the default may be than the best of the others


def memory_reuse(kind: str, cards: int, quick: bool, notes: Notes) -> Iterator[Row]:
    """Time and memory of a job whose weights are sharded, by REUSE: the default's relative to the best of the other
    values."""
    degrees = [degree for degree in DEGREES if degree <= cards]
    if kind != "npu" or not degrees:
        notes.leave_out(f"{REUSE} with fsdp", "there are no two NPUs")
        return
    job, plan = job_for(kind, quick), _plan(ulysses=degrees[-1], fsdp=True)
    steps, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_transformer(Path(folder), job)
        for value in VALUES:
            with notes.noted(f"{REUSE}={value}"), Runtime(plan, kind, environment={REUSE: value}) as runtime:
                _, steps[value], info = _sample(runtime, folder, job, plan)
                memory[value] = float(info["device memory"].split()[0])
    if len(memory) < len(VALUES):
        return
    context = context_of(quick, kind, ranks=plan.ranks, blocks=job.blocks, step_s=steps, memory_gb=memory)
    for what, found in (("time", steps), ("memory", memory)):
        best = min(number for value, number in found.items() if value != "2")
        yield Row(name=f"ascend.fsdp_reuse2_{what}", value=found["2"] / best, unit="times", better="lower",
                  baseline=WORSE, context=context)  # fmt: skip


def write_transformer(folder: Path, job: Job) -> None:
    """A diffusers folder of a fixed transformer that preserves its input's variance."""
    generator, dtype = torch.Generator().manual_seed(0), torch.float32 if job.dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        network = getattr(diffusers, job.config["_class_name"]).from_config(job.config)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    (folder / "transformer").mkdir()
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(job.config))


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise / math.sqrt(math.prod(shape[1:]))
    return 0.1 * noise + ("norm" in name and name.endswith("weight"))


def _sample(
    runtime: Runtime, folder: str, job: Job, plan: ParallelSpec, operators: OperatorSpec = OperatorSpec()
) -> tuple[Tensor, float, dict]:
    """(the latent, seconds per step after a warm-up, the job's `info`)"""
    result = runtime.sample(
        DiffusionModelSpec(path=folder, dtype=job.dtype), SampleSpec(steps=job.steps),
        torch.zeros(job.size.latent_shape()), *job.prompts(), parallel=plan, warm_up=True, operators=operators,
    )  # fmt: skip
    return result.tensor, result.seconds["denoise"] / job.steps, result.info


def _rows(name: str, kind: str, quick: bool, job: Job, plan: ParallelSpec, made, one) -> Iterator[Row]:
    (latent, seconds, _), (one_latent, one_seconds, _) = made, one
    size = job.size
    context = context_of(
        quick, kind, ranks=plan.ranks, dtype=job.dtype, steps=job.steps, blocks=job.blocks,
        heads=job.config["num_attention_heads"], job=f"{size.num_frames} frames of {size.width} x {size.height}",
        step_s=round(seconds, 4), one_step_s=round(one_seconds, 4),
    )  # fmt: skip
    ideal = 1 if kind == "cpu" else plan.ranks  # on a CPU, ranks share the cores that one rank has exclusively
    yield Row(
        name=f"ascend.{name}_speedup", value=one_seconds / seconds, unit="times", better="higher",
        baseline=EFFICIENCY * ideal, context=context,
    )  # fmt: skip
    difference = float((latent - one_latent).abs().max() / one_latent.abs().max())
    yield Row(
        name=f"ascend.{name}_difference", value=difference, unit="share", better="lower",
        baseline=LARGEST_DIFFERENCE[job.dtype], context={**context, "measure": MEASURE},
    )  # fmt: skip
