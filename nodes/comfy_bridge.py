"""Between ComfyUI and the ranks: progress, previews, interrupt and requests for memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import get_executing_context
from msgspec.structs import replace
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..ascend_runtime.acceleration.report import words_of
from ..ascend_runtime.client.group import RankDied
from ..ascend_runtime.client.model_calls import NetworkPass  # noqa: F401 (for nodes that do not know the client)
from ..ascend_runtime.client.runtime import Runtime
from ..ascend_runtime.client.submission import JobCancelled, RankError, Result
from ..ascend_runtime.errors import with_page
from ..ascend_runtime.hardware.devices import resolve_kind, resolve_ranks
from ..ascend_runtime.specs import Cluster, ParallelSpec, VaeForm
from ..ascend_runtime.specs.cluster import read_cluster
from .metadata import kept
from .types import Handle, ModelHandle, RanksHandle

logger = logging.getLogger(__name__)

# Entries of Result.info that its line in the log lacks.
LOGGED_SEPARATELY = ("acceleration", "machines", "plan", "warnings", "peak bytes")
PREVIEW_SCALE = 8  # pixels of the video per pixel of a latent
PREVIEW_SIZE = 512  # pixels: the longest side of a preview that ComfyUI sends


class _Group(NamedTuple):
    """A group of ranks that a graph asks for. device: with a cluster, as the user gives it."""

    world_size: int
    device: str
    cluster: Cluster | None

    def __str__(self) -> str:
        return f"{self.world_size} on " + (self.device if self.cluster is None else f"the cluster {self.cluster.name}")


_runtime: Runtime | None = None
_runtime_group: _Group | None = None  # its ranks
_runtime_of: str | None = None  # the last prompt that used it


def run_job(ranks: RanksHandle, job: Callable[[Runtime, dict], Result], preview: bool = False) -> Result:
    """Runs `job(runtime, hooks)` on the ranks, with progress, previews and the Cancel button of the running node."""
    runtime = _runtime_for(ranks)
    _memory.count()
    bar = comfy.utils.ProgressBar(1)
    hooks = {"on_progress": lambda stage, step, total: bar.update_absolute(*_shown(stage, step, total))}
    if preview:
        hooks["on_preview"] = lambda step, total, image: bar.update_absolute(step, total, _jpeg(image))
    result = _run(runtime, job, hooks)
    if _runtime_group.cluster is not None:
        result.info["machines"] = runtime.machines
    kept.add(result.record)
    _log(result, runtime)
    return result


class ModelCalls:
    """The model calls of one run of a sampler in this process. Only the reading of weights shows progress, as the
    sampler shows its steps; the log gets one line for the run."""

    def __init__(self, ranks: RanksHandle):
        self._runtime = _runtime_for(ranks)
        self._calls, self._seconds, self._info, self._record = 0, Counter(), {}, None
        _memory.count()

    def run(self, call: Callable[[Runtime, dict], Result]) -> Tensor:
        """The tensor that `call(runtime, hooks)` results in. Between two calls, Cancel takes effect."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        _memory.count()  # ComfyUI may have freed the weights since the last call
        result = _run(self._runtime, call, {"on_progress": _show_loading})
        self._calls += 1
        self._seconds.update(result.seconds)
        self._info = result.info
        if result.record is not None:
            predicted = result.record.predicted or (self._record.predicted if self._record else "")
            self._record = replace(result.record, predicted=predicted)
        return result.tensor

    def log(self) -> None:
        """Logs what the calls took on the ranks, and what accelerators saved; and keeps their record."""
        if self._calls:
            logger.info("Ascend: %d model calls, %.2f s on the ranks.", self._calls, sum(self._seconds.values()))
        if self._record is not None:
            kept.add(replace(self._record, calls=self._calls, seconds=dict(self._seconds)))
        if "acceleration" in self._info:
            logger.info("Ascend: %s.", words_of(self._info, {}))


def network(model: ModelHandle) -> dict:
    """What a diffusion model is (see `Runtime.network`). The ranks look it up, because the disk may be slow."""
    return _run(_runtime_for(model.ranks), lambda runtime, hooks: runtime.network(model.spec, **hooks), {})


def vae_form(vae: Handle) -> VaeForm:
    """The form of the VAE's latents. The ranks look it up, because the disk may be slow."""
    return _run(_runtime_for(vae.ranks), lambda runtime, hooks: runtime.vae_form(vae.spec, **hooks), {})


def text_encoders(encoder: Handle) -> Result:
    """What text encoders are; see `Runtime.text_encoders`."""
    return _run(_runtime_for(encoder.ranks), lambda runtime, hooks: runtime.text_encoders(encoder.spec, **hooks), {})


def _run(runtime: Runtime, job: Callable[[Runtime, dict], object], hooks: dict):
    """What `job` returns. A cancelled job raises ComfyUI's own exception for interruptions."""
    always = {"should_cancel": comfy.model_management.processing_interrupted, "on_notice": _notice}
    try:
        with _explained():
            return job(runtime, always | hooks)
    except JobCancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


@contextmanager
def _explained() -> Iterator[None]:
    """An error with a code also says where the code is explained."""
    try:
        yield
    except (ValueError, RuntimeError, TimeoutError) as error:
        error.args = (with_page(str(error)),)
        raise


def _notice(text: str) -> None:
    """Shows a sentence on the running node while it runs, in the page that queued it."""
    server = PromptServer.instance
    if server.client_id is not None and server.last_node_id is not None:
        server.send_progress_text(text, server.last_node_id, sid=server.client_id)


def _show_loading(stage: str, step: int, total: int) -> None:
    if stage == "load":
        comfy.utils.ProgressBar(1).update_absolute(*_shown(stage, step, total))


def _shown(stage: str, step: int, total: int) -> tuple[int, int]:
    """Progress as ComfyUI shows it, (done, total): percent while weights are read, otherwise steps."""
    return (100 * step // total, 100) if stage == "load" else (step, total)


def _log(result: Result, runtime: Runtime) -> None:
    facts = [f"{name} {value}" for name, value in result.info.items() if name not in LOGGED_SEPARATELY]
    times = [f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items()]
    where = ", machine ".join([runtime.device, *result.info.get("machines", ())])
    logger.info("Ascend, %d rank(s) on %s: %s", runtime.world_size, where, ", ".join(facts + times))
    if "denoise" in result.seconds:
        logger.info("Ascend: %s.", words_of(result.info, result.seconds))


def release(end_ranks: bool = False) -> None:
    """Frees the ranks' weights, or ends the ranks. Those of a cluster cannot be ended from here: they free their
    weights, and wait for the next client."""
    global _runtime
    if _runtime is None:
        return
    if not end_ranks:
        _runtime.free()
        return
    runtime, _runtime = _runtime, None
    try:
        if _runtime_group.cluster is not None:
            runtime.free()
    except (RankDied, RankError) as error:
        _log_not_freed(error)
    finally:
        runtime.stop()


def output_folder(name: str) -> str:
    """The path of a folder in ComfyUI's output folder. Raises ValueError for a name that points outside."""
    name = name.strip()
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"folder is {name!r}; give the name of a folder in ComfyUI's output folder, such as profiles or "
            "profiles/wan, with no absolute path and no '..'."
        )
    return str(Path(folder_paths.get_output_directory()) / name)


def _log_not_freed(error: Exception) -> None:
    logger.warning("Ascend: the ranks could not free their weights: %s", error)


def _runtime_for(ranks: RanksHandle) -> Runtime:
    """The runtime with these ranks. A runtime with other ranks ends first, because both would not fit on the cards."""
    global _runtime, _runtime_group, _runtime_of
    if ranks.parallel is None and _runtime is not None:
        return _runtime
    parallel = ranks.parallel or ParallelSpec()
    wanted = _group_of(parallel, ranks)
    if _runtime is not None and _runtime_group != wanted:
        if _running_prompt() == _runtime_of:
            _warn_of_two_groups(f"{_runtime_group}", f"{wanted}")
        release(end_ranks=True)
    if _runtime is None:
        _runtime, _runtime_group = Runtime(parallel, wanted.device, cluster=wanted.cluster), wanted
    _runtime_of = _running_prompt()
    return _runtime


def _group_of(parallel: ParallelSpec, ranks: RanksHandle) -> _Group:
    """The file of a cluster may have changed since the graph's handle was made: it is read for each job."""
    if ranks.cluster is not None:
        with _explained():
            cluster = read_cluster(ranks.cluster)
        return _Group(cluster.ranks, ranks.device, cluster)
    device = resolve_kind(ranks.device)
    return _Group(resolve_ranks(parallel.ranks, device), device, None)


def _running_prompt() -> str | None:
    context = get_executing_context()
    return context and context.prompt_id


def _warn_of_two_groups(one: str, other: str) -> None:
    text = (
        f"This graph asks for two groups of ranks, {one} and {other}. Only one can run at a time, so in every run each "
        "group ends the other and reads its weights again. Connect one Ascend Parallel Config to all Ascend loaders."
    )
    logger.warning("Ascend: %s", text)
    _notice(text)


def _jpeg(image: Tensor) -> tuple[str, Image.Image, int]:
    """A preview for ComfyUI's progress bar. image: uint8 [H,W,3], a pixel per pixel of the latent."""
    picture = Image.fromarray(image.numpy())
    size = (picture.width * PREVIEW_SCALE, picture.height * PREVIEW_SCALE)
    return "JPEG", picture.resize(size, Image.Resampling.BICUBIC), PREVIEW_SIZE


class AscendRanks(torch.nn.Module):
    """Empty: ComfyUI's log names the ranks' weights after this class."""


class _RankMemory:
    """Represents the ranks' weights among the models that ComfyUI counts as loaded.

    ComfyUI frees memory by detaching those models (its Unload Models button, POST /free, a core model that needs
    room). When it detaches this one, the ranks free their weights.
    """

    def __init__(self):
        self._counted = False
        self._patcher = None

    def count(self) -> None:
        """Adds the weights to the loaded models, until ComfyUI detaches them."""
        if self._counted:
            return
        self._patcher = comfy.model_patcher.ModelPatcher(
            AscendRanks(),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=torch.device("cpu"),
        )
        self._patcher.add_callback(CallbacksMP.ON_DETACH, self._on_detach)
        comfy.model_management.load_models_gpu([self._patcher])
        self._counted = True

    def _on_detach(self, *_) -> None:
        self._counted = False
        try:
            release()
        except (RankDied, RankError) as error:  # it would end ComfyUI's worker; and dead ranks hold no memory
            _log_not_freed(error)


_memory = _RankMemory()
