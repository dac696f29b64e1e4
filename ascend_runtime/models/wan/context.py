"""What the video's tokens attend to besides themselves: a prompt, and with some models an image."""

from __future__ import annotations

from torch import Tensor, nn

from .cost import worth_keeping


class Context:
    """A prompt through all passes of one generation by one network; another network needs one of its own.

    text [B, L, text_dim], as the text encoder makes it; image [B, I, image_dim] for models that see one, and
    [2B, I, image_dim] for those that see a first and a last one, side by side.

    It is the same in every step, so the first pass leaves here what the later ones need of it: the embedders' outputs,
    and where the video's tokens on a rank are few next to the text's, keys and values of every block: these take
    2 B (L + I) D elements a block and branch on this rank, by tp_degree: 0.4 GB a branch for Wan 14B in bfloat16.
    """

    def __init__(self, text: Tensor, image: Tensor | None = None):
        self.text, self.image = text, image
        self.embedded: tuple[Tensor, Tensor | None] | None = None  # text [B, L, D] and image [B, I, D]
        self.keys_values: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # of an attention

    def worth_keeping(self, tokens: int) -> bool:
        """Whether keys and values should be, next to `tokens` of the video on this rank."""
        return worth_keeping(tokens, self.text.shape[1])
