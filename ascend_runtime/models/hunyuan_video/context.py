"""What a HunyuanVideo transformer reads besides the latent and the timestep."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """The context of all passes of one guidance branch.

    text [B, L, text_embed_dim]: without padding, for image-to-video models behind the image's tokens. pooled [B,
    pooled_projection_dim]: of the whole prompt. guidance [B]: the embedded guidance scale times 1000, rounded as in the
    blocks' dtype; None for a model without guidance_embeds, or for a pass without one.
    clean: whether the latent's first frame has no noise, and is modulated so (token replace); None: as the model's
    config says.
    """

    text: Tensor
    pooled: Tensor
    guidance: Tensor | None = None
    clean: bool | None = None
