"""Latents to frames, and frames to latents."""

import logging

from comfy_api.latest import io

from . import comfy_bridge, core_types, report, types
from .page.schema import DEVICES, FAMILIES, SAMPLING, Schema

logger = logging.getLogger(__name__)


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendVAEDecode",
            display_name="Ascend VAE Decode",
            category=SAMPLING,
            search_aliases=[*FAMILIES, *DEVICES, "vae decode", "latent to video", "decode video", "frames", "解码"],
            description="Decodes a video latent on all ranks. Each rank decodes a tile of the frames and writes it "
            "straight into the memory of the IMAGE.",
            inputs=[
                io.Latent.Input("samples", tooltip="From Ascend Sampler or a core sampler."),
                types.Vae.Input("vae", tooltip="From Ascend Load VAE."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, for Create Video.")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        latent = samples["samples"]
        result = comfy_bridge.run_job(vae.ranks, lambda runtime, hooks: runtime.decode(vae.spec, latent, **hooks))
        return io.NodeOutput(result.tensor, ui=report.of_decoding(result.info, result.record))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendVAEEncode",
            display_name="Ascend VAE Encode",
            category=SAMPLING,
            search_aliases=[*FAMILIES, *DEVICES, "vae encode", "image to latent", "video to latent", "编码"],
            description="Encodes the frames of a video, or one image, into a latent on all ranks. Each rank encodes a "
            "tile.",
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="The frames of one video, or one image. As in core's VAE Encode, the sides are cropped to "
                    "a multiple of 8 pixels (16 for Wan2.2-TI2V-5B), and the frames to 4n+1.",
                ),
                types.Vae.Input("vae", tooltip="From Ascend Load VAE."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Ascend Sampler or a core sampler.")],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        frames = core_types.whole_of(pixels, comfy_bridge.vae_form(vae))
        if frames.shape != pixels.shape:
            given, kept = list(pixels.shape[:3]), list(frames.shape[:3])
            logger.info("Ascend VAE Encode crops %s to %s (frames, height, width).", given, kept)
        result = comfy_bridge.run_job(vae.ranks, lambda runtime, hooks: runtime.encode_video(vae.spec, frames, **hooks))
        return io.NodeOutput({"samples": result.tensor})
