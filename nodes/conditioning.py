"""A prompt to CONDITIONING; the size and the duration of a video to an empty LATENT."""

import torch
from comfy_api.latest import io

from ..ascend_runtime.specs import VideoSize as Size
from . import comfy_bridge, report, types
from .image_to_video import sides
from .page.schema import CONDITIONING, FAMILIES, Schema
from .page.validation import refusal


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendTextEncode",
            display_name="Ascend Text Encode",
            category=CONDITIONING,
            search_aliases=[*FAMILIES, "prompt", "clip text encode", "text to video", "negative prompt", "提示词"],
            advanced=("image_interleave",),
            description="Encodes a prompt on the CPU of one rank, with all its cores, or on all ranks: see "
            "placement in Ascend Load Text Encoder. The results of the last 16 prompts are kept.",
            inputs=[
                types.TextEncoder.Input("text_encoder", tooltip="From Ascend Load Text Encoder."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, or what the video should not show. If the text is longer than the model reads "
                    "(512 tokens for Wan, 256 for HunyuanVideo), it is cut; this node and the log then show where.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The first frame, for HunyuanVideo's image-to-video models: the text encoder reads it "
                    "before the text. Connect the same image to Ascend Image To Video.",
                ),
                io.Int.Input(
                    "image_interleave",
                    default=2,
                    min=1,
                    max=512,
                    optional=True,
                    tooltip="Only with an image, which is 576 tokens: 2 keeps every second one, for HunyuanVideo's v1, "
                    "and 4 every fourth, for v2. A larger number gives the text more influence.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Core CONDITIONING, for Ascend Sampler or core's samplers."
                )
            ],
        )

    @classmethod
    def execute(cls, text_encoder, text, image=None, image_interleave=2) -> io.NodeOutput:
        seen = {} if image is None else {"image": image[0, ..., :3], "image_interleave": image_interleave}
        result = comfy_bridge.run_job(
            text_encoder.ranks, lambda runtime, hooks: runtime.encode(text_encoder.spec, text, **seen, **hooks)
        )
        extras = {"pooled_output": result.conditioning.pooled}
        return io.NodeOutput([[result.tensor, extras]], ui=report.of_warnings(result.info))


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
                *sides(),
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
