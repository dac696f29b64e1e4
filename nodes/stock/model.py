"""A core MODEL whose network runs on the ranks, and its loader: what UNETLoader is for a network in this process."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import comfy.model_detection
import comfy.model_patcher
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import io
from msgspec.structs import replace
from torch import Tensor

from ...ascend_runtime.specs import AccelerationSpec, DiffusionModelSpec
from ...ascend_runtime.wire.messages import SamplerRun
from .. import comfy_bridge, model_files, types
from ..page.schema import DEVICES, FAMILIES, LOADERS, Schema
from ..types import ModelHandle, RanksHandle
from . import refusals
from .core_options import options_of, with_further
from .loras import loras_of
from .network import RanksNetwork
from .remote import CPU, RemotePatcher, in_ranks

logger = logging.getLogger(__name__)

WHAT = "This MODEL"
KEY = "ascend_video"  # of what this pack attaches to a MODEL
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_run_numbers = itertools.count(1)


class UNETLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        listed = with_further(model_files.names(model_files.TRANSFORMER), options_of("UNETLoader", "unet_name"))
        return Schema(
            node_id="AscendUNETLoader",
            display_name="Ascend Load Diffusion Model (Core)",
            category=LOADERS,
            search_aliases=[*FAMILIES, *DEVICES, "unet loader", "load diffusion model", "ksampler model", "加载模型"],
            description="Core's Load Diffusion Model with the model on the ranks: its MODEL goes into core's and other "
            "packs' samplers, guiders and LoRA loaders.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=listed,
                    tooltip="A file in models/diffusion_models, or a folder in models/diffusers: a transformer of Wan "
                    "or HunyuanVideo in any format that Ascend Load Diffusion Model reads.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="The ranks keep weights in the dtype that they compute in: bfloat16, or float32 on a CPU. "
                    "The fp8 values have no effect; they are there for graphs made with core's node.",
                ),
                types.parallel_input(),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="For any node that takes core's MODEL.")],
        )

    @classmethod
    def validate_inputs(cls, unet_name) -> bool | str:
        return model_files.check(unet_name, model_files.TRANSFORMER)

    @classmethod
    def execute(cls, unet_name, weight_dtype, parallel=None) -> io.NodeOutput:
        if weight_dtype != "default":
            logger.warning(
                "Ascend: weight_dtype %s has no effect: the ranks do not convert the weights of %s to fp8.",
                weight_dtype, unet_name,
            )  # fmt: skip
        spec = DiffusionModelSpec(path=model_files.path_of(unet_name, model_files.TRANSFORMER))
        return io.NodeOutput(model_of(ModelHandle(spec, parallel or RanksHandle())))


class RanksPatcher(RemotePatcher):
    """A MODEL whose weights are in the ranks. What would read or change weights in this process is refused."""

    def model_state_dict(self, filter_prefix=None):
        """Names and shapes of the network's tensors. Core asks for those under a prefix to read the weights."""
        if filter_prefix is not None:
            raise ValueError(in_ranks(WHAT, "compared with another one"))
        return super().model_state_dict()

    def state_dict_for_saving(self, *args, **kwargs):
        _refuse_saving()

    def add_hook_patches(self, hook, *args, **kwargs):
        raise ValueError(
            "A hook changes weights of this MODEL for a part of the conditioning or of the steps (Create Hook LoRA, "
            "Create Hook Model as LoRA). The ranks cannot do this. Use a LoRA loader on the MODEL instead, or "
            f"{refusals.CORE}."
        )

    def deepclone_multigpu(self, *args, **kwargs):
        raise RuntimeError(  # core's nodes take this type of error for "not possible"
            "This MODEL runs on the ranks of Ascend Video, which use all cards already, so core cannot put copies of "
            "it on devices. Take MultiGPU CFG Split or Select Model Device out of the graph; Ascend Parallel Config "
            "sets which cards do what."
        )


def model_of(handle: ModelHandle) -> RanksPatcher:
    """A MODEL of a diffusion model on the ranks. Reads names and shapes of its tensors, and no weights.

    Raises ValueError if ComfyUI has no model for this network.
    """
    facts = comfy_bridge.network(handle)
    model = _core_model(facts["shapes"])
    if model is None:
        raise ValueError(
            f"This ComfyUI has no MODEL for {handle.spec.path}. Use Ascend Load Diffusion Model with Ascend Sampler."
        )
    model.diffusion_model = RanksNetwork(model.diffusion_model, facts["channels"])
    model.what = WHAT  # for the patcher's errors
    model.memory_usage_factor = 0  # the ranks' memory is not this process's
    model.state_dict_for_saving = _refuse_saving
    patcher = RanksPatcher.of(model)
    patcher.set_attachments(KEY, Attached(handle))
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _check_then_prepare)
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _begin)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, _end)
    return patcher


@dataclass(frozen=True)
class Attached:
    """What a MODEL carries for the ranks. Clones share it."""

    handle: ModelHandle
    acceleration: AccelerationSpec = AccelerationSpec()


def attached_to(model: comfy.model_patcher.ModelPatcher) -> Attached | None:
    """What a MODEL carries for the ranks; None for a MODEL of this process."""
    return model.get_attachment(KEY)


class Run:
    """One run of a sampler: what its model calls have in common. Has no reference to the MODEL, which refers to it."""

    def __init__(self, attached: Attached, spec: DiffusionModelSpec):
        self.calls = comfy_bridge.ModelCalls(attached.handle.ranks)
        self._attached, self._spec = attached, spec
        self._number = next(_run_numbers)

    def velocities(self, passes: list[comfy_bridge.NetworkPass], sigmas: tuple[float, ...], step: int) -> Tensor:
        """The velocities [passes * B, C, T, H, W] of passes in one step of the run."""
        handle = self._attached.handle
        return self.calls.run(
            lambda runtime, hooks: runtime.velocity(
                self._spec,
                passes,
                SamplerRun(number=self._number, sigmas=sigmas),
                step,
                parallel=handle.ranks.parallel,
                operators=handle.operators,
                acceleration=self._attached.acceleration,
                **hooks,
            )
        )


def _core_model(shapes: dict[str, list[int]]) -> BaseModel | None:
    """Core's model for tensors of these names and shapes, its network on the meta device; None if core has none."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    if config is None:
        return None
    config.set_inference_dtype(torch.float32, None)
    try:
        model = config.get_model(tensors, "", device=torch.device("meta"))
    except (ArithmeticError, AssertionError):  # core takes the published sizes of heads as given
        return None
    model.device = CPU
    return model


def _check_then_prepare(executor, model: RanksPatcher, noise_shape, conds: dict, *args, **kwargs):
    """Around core's loading of models for a sampler: refuses before anything is loaded."""
    refusals.of_patcher(model)
    refusals.of_conditioning(conds)
    loras_of(model)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _begin(patcher: RanksPatcher) -> None:
    """Makes the network ready for one run of a sampler."""
    attached = attached_to(patcher)
    patcher.model.diffusion_model.run = Run(attached, _spec_of(patcher, attached.handle.spec))


def _end(patcher: RanksPatcher) -> None:
    network = patcher.model.diffusion_model
    if network.run is not None:
        network.run.calls.log()
        network.run = None


def _spec_of(patcher: RanksPatcher, spec: DiffusionModelSpec) -> DiffusionModelSpec:
    """The spec with what nodes have attached to the MODEL: LoRAs, and a dtype by ModelComputeDtype."""
    dtype = patcher.object_patches.get("manual_cast_dtype")
    if dtype is not None:
        spec = replace(spec, dtype=DTYPES[dtype])
    return replace(spec, loras=loras_of(patcher))


def _refuse_saving(*args, **kwargs):
    raise ValueError(in_ranks(WHAT, "saved"))
