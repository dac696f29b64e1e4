"""Which steps of a sampling job to record, and where to."""

from __future__ import annotations

from comfy_api.latest import io

from ..ascend_runtime.specs import ProfileSpec
from ..ascend_runtime.specs.parallel import MAX_RANKS
from . import comfy_bridge, types
from .validation import refusal


class Profiler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendProfiler",
            display_name="Ascend Profiler",
            category="Ascend",
            description="Records steps of Ascend Sampler on one rank, for TensorBoard, Perfetto or MindStudio Insight.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="profiles",
                    tooltip="A folder in ComfyUI's output folder. Each recording makes a folder of its own in it.",
                ),
                io.Int.Input(
                    "first_step",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="The first step that is recorded. Step 1 also shows what is done once for each video.",
                ),
                io.Int.Input(
                    "last_step",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="The last step that is recorded. A few are enough: each takes megabytes.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MAX_RANKS - 1,
                    tooltip="The rank that is recorded, counted from 0.",
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
