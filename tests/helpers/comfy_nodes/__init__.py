"""Nodes for tests, in the real ComfyUI: random images, texts and what CLIP saw, a core VAE, files of what comes out,
and what keeps an IMAGE beyond its prompt; what other packs attach to a MODEL (attaching.py); a core model that is
corrected in one place; a CLIP of two layers, as core has none but large ones, and other networks as small as their
files (small_loaders.py); Cancel at a wanted moment (cancelling.py); ComfyUI without metadata (metadata.py); and
which jobs a graph asks the ranks for (recording.py)."""

from pathlib import Path

import comfy.clip_vision
import comfy.sd
import folder_paths
import torch
from comfy.clip_model import CLIPVisionModelProjection
from comfy.clip_vision import Output
from comfy_api.latest import ComfyExtension, io
from diffusers import AutoModel
from safetensors.torch import save_file

from . import attaching, small_core
from . import cancelling, metadata, recording, small_loaders  # noqa: F401 (what they do on import)
from .weight_patches import PatchWeights

CATEGORY = "tests"


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class RandomImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("seed", "frames", "width", "height")
        inputs = [*(io.Int.Input(name) for name in names), io.Int.Input("colours", optional=True)]
        return io.Schema("TestRandomImage", category=CATEGORY, inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, seed, frames, width, height, colours=3):
        return io.NodeOutput(random(seed, frames, height, width, colours))


class RandomClipVision(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TestRandomClipVision", category=CATEGORY, inputs=[io.Int.Input("seed")],
                         outputs=[io.ClipVisionOutput.Output()])  # fmt: skip

    @classmethod
    def execute(cls, seed):
        output = Output()
        output.penultimate_hidden_states = random(seed, 1, 257, 1280) - 0.5
        return io.NodeOutput(output)


class RandomText(io.ComfyNode):
    """A CONDITIONING as a text encoder with a pooled vector could have made it."""

    @classmethod
    def define_schema(cls):
        names = ("seed", "tokens", "width", "pooled")
        return io.Schema("TestRandomText", category=CATEGORY, inputs=[io.Int.Input(name) for name in names],
                         outputs=[io.Conditioning.Output()])  # fmt: skip

    @classmethod
    def execute(cls, seed, tokens, width, pooled):
        text, vector = random(seed, 1, tokens, width) - 0.5, random(seed + 1, 1, pooled) - 0.5
        return io.NodeOutput([[4 * text, {"pooled_output": 4 * vector}]])


class FewLayers(CLIPVisionModelProjection):
    """Takes the first two layers of a file, for which core would build as many as the published network has."""

    def __init__(self, config, *args):
        super().__init__({**config, "num_hidden_layers": 2}, *args)


comfy.clip_vision.IMAGE_ENCODERS["clip_vision_model"] = FewLayers


class CoreVae:
    """A VAE of any size with what core's nodes ask of theirs, whose own are large."""

    crop_input, output_channels = True, 3

    def __init__(self, folder: str):
        self.vae = AutoModel.from_pretrained(folder).eval()
        config = self.vae.config
        self.latent_channels = config.get("z_dim") or config.latent_channels
        self.spatial = config.get("scale_factor_spatial") or config.spatial_compression_ratio

    def spacial_compression_encode(self) -> int:
        return self.spatial

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = comfy.sd.VAE.vae_encode_crop_pixels(self, pixels)
        return self.vae.encode(pixels.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()


class LoadCoreVae(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TestLoadCoreVae", category=CATEGORY, inputs=[io.String.Input("folder")],
                         outputs=[io.Vae.Output()])  # fmt: skip

    @classmethod
    def execute(cls, folder):
        return io.NodeOutput(CoreVae(folder))


class GuidanceOfLaterFrames(torch.nn.Module):
    """HunyuanVideo's embedder of the guidance scale, for models that read a clean first frame: zeros for that frame."""

    def __init__(self, embedder: torch.nn.Module):
        super().__init__()
        self.embedder = embedder

    def forward(self, sinusoid: torch.Tensor) -> torch.Tensor:
        embedded = self.embedder(sinusoid)
        return torch.stack([torch.zeros_like(embedded), embedded], dim=1)


class NoGuidanceOfFirstFrame(io.ComfyNode):
    """Core adds the embedded guidance to what modulates a clean first frame too; the original and diffusers do not."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestNoGuidanceOfFirstFrame", category=CATEGORY, inputs=[io.Model.Input("model")],
                         outputs=[io.Model.Output()])  # fmt: skip

    @classmethod
    def execute(cls, model):
        name, model = "diffusion_model.guidance_in", model.clone()
        model.add_object_patch(name, GuidanceOfLaterFrames(model.get_model_object(name)))
        return io.NodeOutput(model)


class Save(io.ComfyNode):
    """Writes what a CONDITIONING and a LATENT hold, and an IMAGE."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TestSave", category=CATEGORY, is_output_node=True,
            inputs=[io.Conditioning.Input("conditioning", optional=True), io.Latent.Input("latent", optional=True),
                    io.Image.Input("images", optional=True)],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning=None, latent=None, images=None):
        held = {**(latent or {}), "images": images}
        for text, extras in conditioning or []:
            held |= {"text": text, **extras}
        if held.get("clip_vision_output") is not None:
            held["clip_vision_output"] = held["clip_vision_output"].penultimate_hidden_states
        held = {name: torch.tensor(float(x)) if isinstance(x, (int, float)) else x for name, x in held.items()}
        tensors = {name: value.contiguous() for name, value in held.items() if isinstance(value, torch.Tensor)}
        return _saved(tensors)


def _saved(tensors: dict[str, torch.Tensor]) -> io.NodeOutput:
    folder, name, counter, _, _ = folder_paths.get_save_image_path("held", folder_paths.get_output_directory())
    file = f"{name}_{counter:05}_.safetensors"
    save_file(tensors, Path(folder) / file)
    return io.NodeOutput(ui={"held": [{"filename": file, "subfolder": "", "type": "output"}]})


HELD: list[torch.Tensor] = []


class Hold(io.ComfyNode):
    """Keeps a view of an IMAGE, of all frames but the first, and says where in this process the IMAGE lies."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestHold", category=CATEGORY, is_output_node=True, inputs=[io.Image.Input("images")])

    @classmethod
    def execute(cls, images):
        HELD.append(images[1:])
        return io.NodeOutput(ui={"address": [images.data_ptr()]})


class LetGo(io.ComfyNode):
    """Writes what is held, and holds it no more."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestLetGo", category=CATEGORY, is_output_node=True, inputs=[io.Int.Input("seed")])

    @classmethod
    def execute(cls, seed):
        return _saved({"images": HELD.pop().contiguous()})


class TestNodes(ComfyExtension):
    async def get_node_list(self):
        return [RandomImage, RandomClipVision, RandomText, LoadCoreVae, NoGuidanceOfFirstFrame, Save, Hold, LetGo,
                *attaching.NODES, *small_core.NODES, PatchWeights]  # fmt: skip


async def comfy_entrypoint():
    return TestNodes()
