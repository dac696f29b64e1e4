"""Accelerators of the ranks for a core MODEL."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ...ascend_runtime.specs import AccelerationSpec
from .. import types
from ..page.schema import ACCELERATION, Schema
from . import model as models


class ApplyAcceleration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendApplyAcceleration",
            display_name="Ascend Apply Acceleration",
            category=ACCELERATION,
            search_aliases=[
                "speed up", "ksampler", "teacache", "magcache", "fbcache", "sparse attention", "cache model", "加速",
            ],
            description="Adds accelerators to a MODEL on the ranks, for core's and other packs' samplers. They skip "
            "the same work as in Ascend Sampler.",
            inputs=[
                io.Model.Input("model", tooltip="From Ascend Load Diffusion Model (Core)."),
                types.Acceleration.Input(
                    "acceleration",
                    tooltip="From Ascend AttentionCache, Block Cache, Step Cache or RainFusion. They need a sampler "
                    "that runs the model once a step, such as euler, dpmpp_2m, uni_pc, res_multistep or lcm.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The MODEL with the accelerators.")],
        )

    @classmethod
    def execute(cls, model, acceleration) -> io.NodeOutput:
        attached = models.attached_to(model)
        if attached is None:
            raise ValueError(
                "This MODEL does not run on the ranks of Ascend Video, so their accelerators have no effect on it. "
                "Load it with Ascend Load Diffusion Model (Core), or take Ascend Apply Acceleration out of the graph."
            )
        both = combined(attached.acceleration, acceleration)
        accelerated = model.clone()
        accelerated.set_attachments(models.KEY, replace(attached, acceleration=both))
        return io.NodeOutput(accelerated)


def combined(one: AccelerationSpec, other: AccelerationSpec) -> AccelerationSpec:
    """The accelerators of both. Raises ValueError for two of one kind, and for two caches."""
    for kind in other.kinds:
        one = one.with_accelerator(kind, getattr(other, kind))
    return one
