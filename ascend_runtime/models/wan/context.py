"""The context of cross-attention: the prompt, and with some models an image."""

from __future__ import annotations

from torch import Tensor, nn

from .cost import worth_keeping


class Context:
    """The context of all passes of one network in one generation; each network needs its own.

    text [B, L, text_dim], from the text encoder; image [B, I, image_dim] for models with one image, [2B, I, image_dim]
    for models with a first and a last image; image_tokens: how many of the image's tokens are attended to (None: all).
    reference [B, C, H, W]: the latent of an image, for models with a layer for it (ref_conv).

    It is the same in every step, so the first pass caches the embedders' outputs here. If a rank has few video tokens
    compared to text tokens, it also caches the keys and values of every block: 2 B (L + I) D / tp_degree elements for
    each block and branch, 0.4 GB a branch for Wan 14B in bfloat16.
    """

    def __init__(
        self,
        text: Tensor,
        image: Tensor | None = None,
        image_tokens: int | None = None,
        reference: Tensor | None = None,
    ):
        self.text, self.image, self.image_tokens, self.reference = text, image, image_tokens, reference
        self.embedded: tuple[Tensor, Tensor | None] | None = None  # text [B, L, D] and image [B, I, D]
        self.keys_values: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # by attention module

    def worth_keeping(self, tokens: int) -> bool:
        """Whether keys and values should be cached, for `tokens` video tokens on this rank."""
        return worth_keeping(tokens, self.text.shape[1])
