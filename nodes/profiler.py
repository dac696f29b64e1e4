"""Which steps of a sampling job to record, and in which folder."""

from __future__ import annotations

from comfy_api.latest import io

from ..ascend_runtime.specs import ProfileSpec
from ..ascend_runtime.specs.parallel import MAX_RANKS
from . import comfy_bridge, types
from .page.schema import TOOLS, Schema
from .page.validation import refusal


class Profiler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendProfiler",
            display_name="Ascend Profiler",
            category=TOOLS,
            search_aliases=[
                "profile", "trace", "tensorboard", "mindstudio insight", "performance", "timeline", "npu", "性能分析",
            ],
            description="Records some steps of Ascend Sampler on one rank, for TensorBoard, Perfetto or MindStudio "
            "Insight.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="profiles",
                    tooltip="A folder in ComfyUI's output folder. Each recording gets its own folder in it.",
                ),
                io.Int.Input(
                    "first_step",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="The first step to record, counted from 1. Step 1 also includes the work that is done "
                    "once per video.",
                ),
                io.Int.Input(
                    "last_step",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="The last step to record. A few steps are enough, because each takes megabytes.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANKS - 1,
                    tooltip="The rank to record, counted from 0.",
                ),
            ],
            outputs=[types.Profile.Output(display_name="profile", tooltip="For Ascend Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, folder, first_step, last_step, rank) -> bool | str:
        return refusal(_spec, folder, first_step, last_step, rank)

    @classmethod
    def execute(cls, folder, first_step, last_step, rank) -> io.NodeOutput:
        return io.NodeOutput(_spec(folder, first_step, last_step, rank))


def _spec(folder, first_step, last_step, rank) -> ProfileSpec:
    path = comfy_bridge.output_folder(folder)
    return ProfileSpec(folder=path, first_step=first_step, last_step=last_step, rank=rank)
