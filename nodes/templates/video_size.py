"""The size of a video by seconds and frames per second, as people think of it."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...ascend_runtime.specs import VideoSize as Size
from ..image_to_video import SIDE
from ..page.schema import CONDITIONING, Schema
from ..validation import refusal


class VideoSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendVideoSize",
            display_name="Ascend Video Size",
            category=CONDITIONING,
            search_aliases=[
                "empty latent video", "text to video t2v", "video length", "duration", "seconds fps", "resolution",
                "视频时长", "空 Latent",
            ],
            description="Sets the size and the duration of a video. The number of frames follows: the nearest 4n+1, as "
            "the models need it.",
            inputs=[
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip=SIDE.format("width")),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip=SIDE.format("height")),
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=0.0,
                    max=512.0,
                    step=0.1,
                    round=0.001,
                    tooltip="How long the video is. 5 seconds at 16 frames per second are 81 frames. Models make the "
                    "best videos of the duration that they were trained for, which is about 5 seconds.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    round=0.001,
                    tooltip="Frames per second: 16 for Wan 2.1 and Wan 2.2 A14B, 24 for Wan2.2-TI2V-5B and "
                    "HunyuanVideo.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="An empty latent of this size, for Ascend Sampler. Not for Wan2.2-TI2V-5B, whose latent "
                    "comes from Ascend Image To Video.",
                ),
                io.Int.Output(display_name="width", tooltip="For Ascend Image To Video."),
                io.Int.Output(display_name="height", tooltip="For Ascend Image To Video."),
                io.Int.Output(display_name="length", tooltip="The number of frames, for Ascend Image To Video."),
                io.Float.Output(display_name="fps", tooltip="For core's Create Video."),
            ],
        )

    @classmethod
    def validate_inputs(cls, width, height, seconds, fps) -> bool | str:
        return refusal(Size.of_seconds, width, height, seconds, fps)

    @classmethod
    def execute(cls, width, height, seconds, fps) -> io.NodeOutput:
        size = Size.of_seconds(width, height, seconds, fps)
        return io.NodeOutput({"samples": torch.zeros(size.latent_shape())}, width, height, size.num_frames, fps)
