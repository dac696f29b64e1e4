"""What a HunyuanVideo transformer reads besides the latent and the timestep."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

GUIDANCE_UNIT = 1000  # of the embedded guidance scale, as a timestep's

@dataclass(frozen=True, eq=False)
class Context:
    """The context of all passes of one guidance branch.

    text [B, L, text_embed_dim]: without padding, for image-to-video models behind the image's tokens. pooled [B,
    pooled_projection_dim]: of the whole prompt. guidance [B]: the embedded guidance scale times 1000, rounded as in the
    blocks' dtype; None for a model without guidance_embeds, or for a pass without one.
    clean: whether the latent's first frame has no noise, and is modulated so (token replace); None: as the model's
    config says. whole_vector: whether the first frame is then modulated by the guidance too, and by the clean vector in
    the head too, as in core ComfyUI; in the authors' code and diffusers it is neither.
    mean [B, text_embed_dim]: of the text; None: that of its tokens here.
    """

    text: Tensor
    pooled: Tensor
    guidance: Tensor | None = None
    clean: bool | None = None
    whole_vector: bool = False
    mean: Tensor | None = None
