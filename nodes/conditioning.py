"""Text to CONDITIONING."""

from comfy_api.latest import io, ui

from . import comfy_bridge, types


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendTextEncode",
            display_name="Ascend Text Encode",
            category="Ascend",
            description="Encodes a prompt with UMT5, where Ascend Load Text Encoder places it: on the CPU of one rank, "
            "which gets all cores for it, or on all ranks. The last 16 prompts are known, and need no encoder.",
            inputs=[
                types.TextEncoder.Input("text_encoder", tooltip="From Ascend Load Text Encoder."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, or what the video should not show. At most 512 tokens are read: where more "
                    "are cut off is shown here and in the log.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Core CONDITIONING, for Ascend Sampler or core's samplers."
                )
            ],
        )

    @classmethod
    def execute(cls, text_encoder, text) -> io.NodeOutput:
        result = comfy_bridge.run_job(
            text_encoder.ranks, lambda runtime, hooks: runtime.encode(text_encoder.spec, text, **hooks)
        )
        warnings = "\n".join(result.info.get("warnings", ()))
        extras = {"pooled_output": result.conditioning.pooled}
        return io.NodeOutput([[result.tensor, extras]], ui=ui.PreviewText(warnings))
