"""Text to CONDITIONING."""

from comfy_api.latest import io

from . import comfy_bridge, report, types
from .page.schema import CONDITIONING, FAMILIES, Schema


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
