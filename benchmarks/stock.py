"""Stock graphs on two ranks: a model call against a ping, what a call sends, a whole graph against Ascend Sampler's.

The graphs run in a real ComfyUI, from their first node to the saved video. The network is random, and takes the text
encoder and the VAE of the embedded model.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from diffusers import WanTransformer3DModel
from tqdm import tqdm

from ascend_runtime import DiffusionModelSpec, ParallelSpec, Runtime, VideoSize
from ascend_runtime.client.model_calls import NetworkPass
from ascend_runtime.client.submission import Result
from ascend_runtime.wire.messages import SamplerRun
from scripts.lib.comfy_server import ComfyServer

from .report import Row, context_of
from .shared_bytes import SharedBytes

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny_wan"
RANKS = 2
SMALL = {"num_attention_heads": 1, "attention_head_dim": 24, "ffn_dim": 16, "freq_dim": 16, "text_dim": 16,
         "num_layers": 1}  # fmt: skip
ROUNDS, CALLS = 40, 50  # of pings, and of calls, by turns
LATENT = VideoSize(width=832, height=480, num_frames=81).latent_shape()  # whose bytes are counted
TEXT = 512  # tokens

WIDTHS = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 3072, "freq_dim": 256, "text_dim": 128,
          "num_layers": 6}  # fmt: skip
QUICK_WIDTHS = {**WIDTHS, "num_attention_heads": 1, "ffn_dim": 64, "num_layers": 1}  # core takes heads of 128
NAME = "benchmark_wan"
JOB = {"width": 320, "height": 192, "length": 17, "steps": 6, "cfg": 4.0, "shift": 8.0}
QUICK_JOB = {**JOB, "width": 64, "height": 64, "length": 5, "steps": 2}
LEAST_STEP = 0.5  # seconds: in shorter steps, the cost of a call would weigh more than in a real video
RUNS = 5


def run(quick: bool) -> Iterator[Row]:
    yield from _calls(quick)
    yield _graphs(quick)


# Model calls


def _calls(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, Runtime(ParallelSpec(ranks=RANKS), device="cpu") as runtime:
        _transformer(Path(folder), SMALL)
        sampler = Sampler(runtime, DiffusionModelSpec(path=folder))
        yield _against_ping(sampler, quick)
        yield _bytes_of_a_step(sampler, quick)


class Sampler:
    """A sampler outside of the ranks, with guidance, whose passes leave all blocks out."""

    def __init__(self, runtime: Runtime, model: DiffusionModelSpec):
        self.runtime, self._model, self._number = runtime, model, 0
        texts = torch.randn(2, TEXT, SMALL["text_dim"], generator=torch.Generator().manual_seed(0))
        self._inputs = {branch: {"text": text[None]} for branch, text in zip(("uncond", "cond"), texts)}

    def steps(self, shape: tuple[int, ...], number: int) -> Iterator[Callable[[], Result]]:
        """The calls of so many steps of one run, from the second one on; the first one has been made."""
        self._number += 1
        run = SamplerRun(number=self._number, sigmas=tuple(1 - step / (number + 1) for step in range(number + 2)))
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))

        def call(step: int) -> Result:
            times = torch.full((1,), 1000 * run.sigmas[step])
            passes = [NetworkPass(branch, latent, times, own, skipped=(0,)) for branch, own in self._inputs.items()]
            return self.runtime.velocity(self._model, passes, run, step)

        call(0)
        for step in range(1, number + 1):
            yield lambda step=step: call(step)


def _against_ping(sampler: Sampler, quick: bool) -> Row:
    """How much longer a model call takes than a ping, without what the ranks say they compute: the network's embedders
    and head, with the blocks left out."""
    rounds, calls = (2, 5) if quick else (ROUNDS, CALLS)
    shape = VideoSize(width=32, height=32, num_frames=1).latent_shape()
    pings, whole, computed = [], [], []
    for number in tqdm(range(rounds + 1), desc="model calls and pings"):
        took = [_timed(sampler.runtime.ping)[0] for _ in range(calls)]
        called = [_timed(call) for call in sampler.steps(shape, calls)]
        if number:  # the first turn loads
            pings += took
            whole += [seconds for seconds, _ in called]
            computed += [result.seconds["denoise"] for _, result in called]
    ping, call, compute = (1e3 * median(seconds) for seconds in (pings, whole, computed))
    context = context_of(quick, ranks=RANKS, runs=len(pings), ping_ms=round(ping, 4), call_ms=round(call, 4),
                         compute_ms=round(compute, 4))  # fmt: skip
    return Row(name="stock.call_over_ping_ms", value=call - compute - ping, unit="ms", better="lower", baseline=0.5,
               context=context)  # fmt: skip


def _bytes_of_a_step(sampler: Sampler, quick: bool) -> Row:
    """The bytes of shared memory that client and ranks fill in a step, over those of the latent and of what comes back
    for it."""
    shape = VideoSize(width=64, height=64, num_frames=5).latent_shape() if quick else LATENT
    filled, steps = [], sampler.steps(shape, 3)
    for call in steps:
        with SharedBytes() as counted:
            answer = call().tensor
        filled.append(counted.sent + counted.received)
    needed = torch.zeros(shape).nbytes + answer.nbytes
    context = context_of(quick, ranks=RANKS, latent=list(shape), step_bytes=filled, needed_bytes=needed)
    return Row(name="stock.bytes_of_a_step", value=max(filled) / needed, unit="ratio", better="lower", baseline=1.001,
               context=context)  # fmt: skip


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


# Whole graphs


def _graphs(quick: bool) -> Row:
    """The seconds of a stock graph over those of ours, for the same video; seeds differ, so that nothing but loaders
    and texts is in ComfyUI's cache."""
    job, runs = (QUICK_JOB, 1) if quick else (JOB, RUNS)
    graphs = {"stock": _stock(job), "ours": _ours(job)}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    with tempfile.TemporaryDirectory() as folder:
        model = shutil.copytree(EMBEDDED, Path(folder) / "models" / "diffusers" / NAME)
        _transformer(model, QUICK_WIDTHS if quick else WIDTHS)
        with ComfyServer(base=folder) as server:
            for number in tqdm(range(runs + 1), desc="whole graphs"):
                for name, graph in graphs.items():
                    graph["sampler"]["inputs"]["seed"] = number
                    took = _took(server, graph)
                    if number:  # the first run loads
                        seconds[name].append(took)
    stock, ours = (median(seconds[name]) for name in ("stock", "ours"))
    step = ours / job["steps"]
    context = context_of(quick, ranks=RANKS, runs=runs, job=job, stock_s=round(stock, 3), ours_s=round(ours, 3),
                         step_s=round(step, 3))  # fmt: skip
    if step < LEAST_STEP:
        context["not_compared"] = f"steps take {step:.2f} s, less than {LEAST_STEP}"
    return Row(name="stock.graph_over_ours", value=stock / ours, unit="ratio", better="lower", baseline=1.03,
               context=context)  # fmt: skip


def _took(server: ComfyServer, graph: dict) -> float:
    """The seconds of a prompt, as ComfyUI says when it began and ended."""
    messages = dict(server.wait(server.queue(graph), timeout=600)["status"]["messages"])
    return (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1e3


def _transformer(folder: Path, widths: dict[str, int]) -> None:
    """Writes a random transformer into a diffusers folder."""
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    torch.manual_seed(0)
    WanTransformer3DModel(**widths).save_pretrained(folder / "transformer")
    if not (folder / "model_index.json").exists():
        (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')


def _node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def _common(job: dict) -> dict:
    parallel = {"ranks": RANKS, "cfg_degree": 0, "ulysses_degree": 0, "device": "cpu"}
    return {
        "parallel": _node("AscendParallelConfig", **parallel),
        "empty": _node("EmptyHunyuanLatentVideo", **{name: job[name] for name in ("width", "height", "length")},
                       batch_size=1),
        "video": _node("CreateVideo", fps=16, images=["frames", 0]),
        "save": _node("SaveVideo", filename_prefix="benchmark", format="auto", codec="auto", video=["video", 0]),
    }  # fmt: skip


def _stock(job: dict) -> dict:
    """Core's nodes, with our loaders."""
    texts = {"positive": "a red circle", "negative": ""}
    return _common(job) | {
        "model": _node("AscendUNETLoader", unet_name=NAME, weight_dtype="default", parallel=["parallel", 0]),
        "clip": _node("AscendCLIPLoader", clip_name=NAME, type="wan", device="default", parallel=["parallel", 0]),
        "vae": _node("AscendVAELoader", vae_name=NAME, parallel=["parallel", 0]),
        **{name: _node("CLIPTextEncode", text=text, clip=["clip", 0]) for name, text in texts.items()},
        "shifted": _node("ModelSamplingSD3", shift=job["shift"], model=["model", 0]),
        "sampler": _node("KSampler", seed=0, steps=job["steps"], cfg=job["cfg"], sampler_name="euler",
                         scheduler="simple", denoise=1.0, model=["shifted", 0], positive=["positive", 0],
                         negative=["negative", 0], latent_image=["empty", 0]),
        "frames": _node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
    }  # fmt: skip


def _ours(job: dict) -> dict:
    """The same with our nodes."""
    texts = {"positive": "a red circle", "negative": ""}
    return _common(job) | {
        "model": _node("AscendLoadDiffusionModel", model_name=NAME, dtype="auto", parallel=["parallel", 0]),
        "encoder": _node("AscendLoadTextEncoder", model_name=NAME, dtype="auto", parallel=["parallel", 0]),
        "vae": _node("AscendLoadVAE", model_name=NAME, dtype="auto", parallel=["parallel", 0]),
        **{name: _node("AscendTextEncode", text=text, text_encoder=["encoder", 0]) for name, text in texts.items()},
        "sampler": _node("AscendSampler", seed=0, steps=job["steps"], cfg=job["cfg"], sampler_name="euler",
                         scheduler="simple", shift=job["shift"], cfg_low_noise=0.0, model=["model", 0],
                         positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0]),
        "frames": _node("AscendVAEDecode", samples=["sampler", 0], vae=["vae", 0]),
    }  # fmt: skip
