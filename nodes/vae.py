"""Latents to frames."""

from comfy_api.latest import io

from . import comfy_bridge, types


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendVAEDecode",
            display_name="Ascend VAE Decode",
            category="Ascend",
            description="Decodes a video latent; the frames are written straight into the memory of the IMAGE.",
            inputs=[
                io.Latent.Input("samples", tooltip="From Ascend Sampler or a core sampler."),
                types.Vae.Input("vae", tooltip="From Ascend Load VAE."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, for Create Video.")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        latent = comfy_bridge.samples_of(samples)
        result = comfy_bridge.run_job(
            vae.ranks, lambda runtime, hooks: runtime.decode(vae.spec, latent, **hooks)
        )
        return io.NodeOutput(result.tensor)
