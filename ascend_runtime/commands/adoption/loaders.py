"""The loaders of core ComfyUI that ours can take the place of, and other loaders, which stay."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...models.family import TEXT_ENCODER, TRANSFORMER, VAE

OURS = "Ascend"  # a loader of ours is named as core's is, with this in front
WHOLE = "checkpoint"  # a file with all networks of a model
FOLDERS = {  # of ComfyUI's models, by the part that they hold
    TRANSFORMER: ("diffusion_models", "unet"), TEXT_ENCODER: ("text_encoders", "clip"), VAE: ("vae",),
    WHOLE: ("checkpoints",),
}  # fmt: skip


@dataclass(frozen=True)
class StockLoader:
    """A loader of core ComfyUI. part: what it loads. widgets: in their order; files: those that name files."""

    core: str
    part: str
    widgets: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def ours(self) -> str:
        return OURS + self.core


STOCK_LOADERS = (
    StockLoader("UNETLoader", TRANSFORMER, ("unet_name", "weight_dtype"), ("unet_name",)),
    StockLoader("CLIPLoader", TEXT_ENCODER, ("clip_name", "type", "device"), ("clip_name",)),
    StockLoader("DualCLIPLoader", TEXT_ENCODER, ("clip_name1", "clip_name2", "type", "device"),
                ("clip_name1", "clip_name2")),  # fmt: skip
    StockLoader("VAELoader", VAE, ("vae_name",), ("vae_name",)),
    StockLoader("CheckpointLoaderSimple", WHOLE, ("ckpt_name",), ("ckpt_name",)),
)
BY_TYPE = {name: loader for loader in STOCK_LOADERS for name in (loader.core, loader.ours)}

SEPARATE = (
    "Load the model, the text encoder and the VAE from separate files, with Load Diffusion Model, Load CLIP and Load "
    "VAE"
)
AS_FILE = "Load the model's fp8_scaled, fp16 or bf16 file with core's loader instead"
OWN_TYPES = "nodes have types of their own, which core's samplers do not take. Open a stock graph of the model instead"
OTHER_LOADERS = (  # patterns of the types of loaders that are left, and why
    (r".*GGUF.*", "it is not a node of core's, though the ranks read its files. Load them with Ascend Load Diffusion "
     "Model (Core) and Ascend Load CLIP (Core)"),
    (r"(Image\w+|unCLIP)?CheckpointLoader.*", f"of checkpoints, only Load Checkpoint has a twin. {SEPARATE}"),
    (r"DiffusersLoader", f"it loads a whole folder. {SEPARATE}, or use Ascend Load Diffusion Model"),
    (r"(Triple|Quadruple)CLIPLoader.*", "its text encoders belong to models that the ranks do not run"),
    (r"(Load)?WanVideo.*Loader.*|LoadWanVideo.*", f"WanVideoWrapper's {OWN_TYPES}"),
    (r"(HyVideo|DownloadAndLoadHyVideo).*Load.*", f"HunyuanVideoWrapper's {OWN_TYPES}"),
    (r"Nunchaku.*Loader.*", f"the ranks do not read its files. {AS_FILE}"),
)
NOT_REPLACED = (
    "no loader of ours can take its place. If it only reads a file, use core's Load Diffusion Model, Load CLIP or Load "
    "VAE instead"
)


def other_loader(node_type: str) -> str:
    """Why a loader of this type is left; empty if the type is unknown."""
    return next((why for pattern, why in OTHER_LOADERS if re.fullmatch(pattern, node_type)), "")
