"""Core ComfyUI's VAE whose work the ranks do, and its loader."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

from ...ascend_runtime.specs import VaeForm, VaeSpec
from .. import comfy_bridge, core_types, model_files, types
from ..page.schema import FAMILIES, LOADERS, Schema
from ..types import Handle, RanksHandle
from .core_options import dtype_for, options_of, with_further
from .remote import RemotePatcher, RemoteWeights, in_ranks, no_such

logger = logging.getLogger(__name__)

WHAT = "The VAE of Ascend Load VAE (Core)"
CORE = "VAELoader", "vae_name"


class RanksVae(comfy.sd.VAE):
    """A VAE with the attributes that core's nodes read. Core's own constructor would build a network."""

    def __init__(self, handle: Handle, form: VaeForm):
        self.handle, self.form = handle, form
        self.first_stage_model = RemoteWeights(WHAT)
        self.patcher = RemotePatcher.of(self.first_stage_model)
        self.size = 1
        self.device = torch.device("cpu")
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]  # of what goes in and comes out
        self.latent_channels, self.latent_dim, self.output_channels = form.channels, 3, 3
        # As comfy.sd.VAE describes video VAEs: frames by a function, height and width by a factor.
        self.upscale_ratio = (lambda t: max(0, (t - 1) * form.temporal + 1), form.spatial, form.spatial)
        self.downscale_ratio = (lambda t: max(0, (t - 1) // form.temporal + 1), form.spatial, form.spatial)
        self.upscale_index_formula = self.downscale_index_formula = (form.temporal, form.spatial, form.spatial)
        self.process_input = lambda image: image * 2 - 1
        self.process_output = lambda frames: ((frames + 1) / 2).clamp(0, 1)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1  # the ranks' memory, not ComfyUI's
        self.crop_input, self.not_video, self.disable_offload, self.extra_1d_channel = True, False, False, None
        self.pad_channel_value = self.format_encoded = None  # these two and the next: of newer ComfyUIs
        self.handles_tiling = False

    def __getattr__(self, name: str):
        raise AttributeError(no_such(WHAT, name))

    def get_sd(self):
        raise ValueError(in_ranks(WHAT, "saved"))

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """Latents [B,C,T,H,W] -> frames [B,T',H',W',3] in 0..1, in the memory that the ranks wrote to."""
        if vae_options:
            names = ", ".join(map(str, vae_options))
            raise ValueError(f"{WHAT} has no options {names}. Remove the node that sets them.")
        latent = samples_in.cpu()
        handle = self.handle
        result = comfy_bridge.run_job(handle.ranks, lambda runtime, hooks: runtime.decode(handle.spec, latent, **hooks))
        return result.tensor.unflatten(0, (latent.shape[0], -1)).to(self.output_device)

    def decode_tiled(self, samples: Tensor, **tiles) -> Tensor:
        """As `decode`."""
        _note_tiles(tiles)
        return self.decode(samples)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """The frames [T,H,W,3 or more] of a video, or of several [B,T,H,W,3 or more], in 0..1 -> a latent [B,C,T,H,W].

        They are cropped as by core: the sides around the middle, the frames at the end.
        """
        videos = pixel_samples if pixel_samples.ndim == 5 else pixel_samples[None]
        return torch.cat([self._encoded(video) for video in videos]).to(self.output_device)

    def encode_tiled(self, pixel_samples: Tensor, **tiles) -> Tensor:
        """As `encode`."""
        _note_tiles(tiles)
        return self.encode(pixel_samples)

    def _encoded(self, video: Tensor) -> Tensor:
        frames = core_types.whole_of(video[..., :3], self.form).cpu()
        handle = self.handle
        return comfy_bridge.run_job(
            handle.ranks, lambda runtime, hooks: runtime.encode_video(handle.spec, frames, **hooks)
        ).tensor


def _note_tiles(tiles: dict) -> None:
    given = ", ".join(f"{name} {value}" for name, value in tiles.items() if value is not None)
    logger.info("Ascend: the ranks divide the frames themselves, without seams; they do not use %s.", given)


class VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        listed = with_further(model_files.names(model_files.VAE), options_of(*CORE))
        return Schema(
            node_id="AscendVAELoader",
            display_name="Ascend Load VAE (Core)",
            category=LOADERS,
            search_aliases=[*FAMILIES, "vae loader", "load vae", "video vae"],
            description="Loads the VAE of Wan or HunyuanVideo as core's Load VAE does, for core's nodes and those of "
            "other packs. All ranks decode and encode, each a part of the frames.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=listed,
                    tooltip="A file in models/vae, or a folder in models/diffusers, such as the VAE of Wan 2.1, of "
                    "Wan2.2-TI2V-5B or of HunyuanVideo. The others in the list, such as taesd and pixel_space, "
                    "need core's Load VAE.",
                ),
                types.parallel_input(),
            ],
            outputs=[
                io.Vae.Output(display_name="VAE", tooltip="For core's VAE Decode, and all other nodes that take a VAE.")
            ],
        )

    @classmethod
    def validate_inputs(cls, vae_name) -> bool | str:
        if vae_name in options_of(*CORE) and vae_name not in model_files.names(model_files.VAE):
            return f"The ranks cannot run the VAE {vae_name}. Load it with core's Load VAE."
        return model_files.check(vae_name, model_files.VAE)

    @classmethod
    def execute(cls, vae_name, parallel=None) -> io.NodeOutput:
        spec = VaeSpec(path=model_files.path_of(vae_name, model_files.VAE), dtype=dtype_for("vae"))
        handle = Handle(spec, parallel or RanksHandle())
        return io.NodeOutput(RanksVae(handle, comfy_bridge.vae_form(handle)))
