"""Notes which jobs a graph asks the ranks for, in the place of doing them: a route that tests ask for.

POST /tests/recording {"on": bool}. On: each job of the pack's `Runtime` is noted and answered with a tensor of the
right shape that depends on what was given, so that the next job shows what the nodes made of it; no rank starts. Off:
the pack works as before. The answer is what was noted since the last request, one object a job: the method's name, and
its arguments, also those with their default.

Arguments, and a description's too, are {"fields": the values by name, "defaults": names of those with their default}.
Paths are relative to ComfyUI's models or to the pack, floats rounded to 6 digits. A tensor is its shape, its dtype and
some of its values. Functions are left out.
"""

import inspect
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import folder_paths
import msgspec
import torch
from aiohttp import web
from server import PromptServer

import nodes

TEXT_DIM = 4096
SAMPLES = 16  # of a tensor's values, evenly spaced from the first to the last
LOADERS = ("AscendLoadDiffusionModel", "AscendLoadTextEncoder", "AscendLoadVAE")  # above each node that asks for a job
jobs: list[dict] = []
replaced: dict = {}  # the Runtime's own methods, by name, while others stand in their place


def encode(given):
    return torch.full((1, 512, TEXT_DIM), sum(given["text"].encode()) / 1e5)


def encode_video(given):
    channels, spatial, temporal = figures_of(given["vae"])
    frames, height, width, _ = given["frames"].shape
    shape = (1, channels, (frames - 1) // temporal + 1, height // spatial, width // spatial)
    return torch.full(shape, (given["frames"][0] + given["frames"][-1]).mean().item())


def sample(given):
    return given["latent"] + given["spec"].seed


def decode(given):
    return torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(0))


JOBS = {"encode": encode, "encode_video": encode_video, "sample": sample, "decode": decode}


def figures_of(vae) -> tuple[int, int, int]:
    """A published VAE's channels, and the pixels and frames that an element of its latents stands for."""
    return (48, 16, 4) if "wan2.2_vae" in vae.path else (16, 8, 4)


def noting(name: str, method):
    """What stands in a method's place."""
    signature, result = inspect.signature(method), get_type_hints(method)["return"]
    defaults = {parameter.name: parameter.default for parameter in signature.parameters.values()}

    def instead(*arguments, **named):
        given = signature.bind(*arguments, **named)
        given.apply_defaults()
        given = {key: value for key, value in given.arguments.items() if key not in ("self", "hooks")}
        noted = {key: value for key, value in given.items() if not callable(value)}
        jobs.append({"job": name, **described(noted, defaults)})
        return result(tensor=JOBS[name](given), seconds={"denoise": 1.0}, info={"steps": 1})

    return instead


def described(values: dict, defaults: dict) -> dict:
    fields = {name: plain(value) for name, value in values.items()}
    return {"fields": fields, "defaults": [name for name, value in fields.items() if value == plain(defaults[name])]}


def plain(value):
    """The value as JSON can carry it."""
    if isinstance(value, torch.Tensor):
        flat = value.flatten()
        some = flat[torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long()].tolist()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "values": [plain(one) for one in some]}
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        values = {field.name: getattr(value, field.name) for field in fields}
        return described(values, {field.name: _default(field) for field in fields})
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return relative(value) if isinstance(value, str) else value


def _default(field):
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def relative(text: str) -> str:
    for folder in (Path(folder_paths.models_dir), Path(bridge().__file__).resolve().parents[1]):
        text = text.removeprefix(f"{folder}/")
    return text


def bridge():
    """The pack's module that asks the ranks for jobs."""
    (name,) = [name for name in sys.modules if name.endswith(".nodes.comfy_bridge")]
    return sys.modules[name]


def start() -> None:
    runtime = bridge().Runtime
    for name in JOBS:
        replaced[name] = getattr(runtime, name)
        setattr(runtime, name, noting(name, replaced[name]))
    if hasattr(runtime, "vae_form"):  # a question, not a job
        replaced["vae_form"] = runtime.vae_form
        form = get_type_hints(runtime.vae_form)["return"]
        runtime.vae_form = lambda self, vae, **_: form(*figures_of(vae), *["wan"][: len(fields(form)) - 3])
    for name in LOADERS:  # results that ComfyUI has kept would save jobs; and these results must not be kept
        nodes.NODE_CLASS_MAPPINGS[name].fingerprint_inputs = classmethod(lambda cls, **_: time.monotonic())


def stop() -> None:
    for name in [*replaced]:
        setattr(bridge().Runtime, name, replaced.pop(name))
    for name in LOADERS:
        if "fingerprint_inputs" in vars(nodes.NODE_CLASS_MAPPINGS[name]):
            del nodes.NODE_CLASS_MAPPINGS[name].fingerprint_inputs


@PromptServer.instance.routes.post("/tests/recording")
async def record(request):
    stop()
    if (await request.json())["on"]:
        start()
    noted = jobs.copy()
    jobs.clear()
    return web.json_response(noted)
