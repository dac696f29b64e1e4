"""The interface of a family's text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from .tokenizers import Tokenizer

Computed = TypeVar("Computed")
OnBlock = Callable[[int, int], None]  # called before each block with (its number from 0, the number of blocks)


@dataclass(frozen=True)
class Encoder:
    """A loaded text encoder and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Picture:
    """An image that a prompt is about. model: the vision tower that reads it. image: [H,W,3] in 0..1. interleave: one
    of its tokens in so many is part of the result."""

    model: nn.Module
    image: Tensor
    interleave: int


@dataclass(frozen=True)
class GivenTokens:
    """Tokens that were made elsewhere. ids [S]. length: the number of those up to the end of the text; those after it
    are padding. embeddings: [n, D] in the place of a token, by its place in `ids`."""

    ids: Tensor
    length: int
    embeddings: Mapping[int, Tensor]


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as its file has it. sentencepiece: whether it is a sentencepiece model, else a tokenizer.json."""

    sentencepiece: bool
    content: bytes


Encoders = dict[str, Encoder]  # by part, the main one first
SHOWN_TOKENS = 12  # the last tokens before the cut that a warning shows
TEXT, POOLED = "text", "pooled"  # results: embeddings [1, tokens, D] of the tokens, and one vector [1, D] of the prompt


class TextEncoding(ABC):
    """How a family encodes prompts."""

    @abstractmethod
    def clean(self, text: str) -> str:
        """The cleaned prompt, which is tokenised."""

    @abstractmethod
    def tokenizer(self, part: str, found: Path | None, shard: Path) -> Tokenizer:
        """A text encoder's tokenizer. found: its folder, or the file that contains it. shard: the encoder's first file.

        Raises ValueError, which says where to get it, if there is none or it cannot be used.
        """

    def check_folder(self, part: str, folder: Path) -> None:
        """Raises ValueError for the folder of a tokenizer whose settings rule it out."""

    def advice(self, part: str) -> str:
        """A sentence that says which tokenizer to use for a text encoder."""
        return ""

    def about(self, picture: Picture) -> TextEncoding:
        """How prompts about an image are encoded. Only for a family with a vision tower (`models.family.VISION`), whose
        prompts may have images."""
        raise NotImplementedError

    @abstractmethod
    def embeddings_in(self, part: str, model: nn.Module) -> int:
        """The number of an encoder's token embeddings."""

    @abstractmethod
    def units(self, part: str, model: nn.Module) -> list[nn.Module]:
        """The modules that FSDP gathers as units, in the order of their first use."""

    @abstractmethod
    def encode(self, encoders: Encoders, text: str, on_block: OnBlock) -> dict[str, Tensor]:
        """The encoders' outputs for a cleaned prompt, without padding, in their dtype, on the CPU."""

    def encode_tokens(self, part: str, encoder: Encoder, given: GivenTokens, on_block: OnBlock) -> dict[str, Tensor]:
        """An encoder's outputs for tokens as they are, in its dtype, on the CPU: TEXT [1, tokens, D], without those of
        the padding if they are zeros, and others of `encode`. Raises ValueError for tokens that it does not read."""
        raise ValueError("The text encoders of this family encode no tokens that were made elsewhere.")

    def tokenizer_file(self, part: str, found: Path | None, shard: Path) -> TokenizerFile:
        """A text encoder's tokenizer for use elsewhere; see `tokenizer`."""
        raise NotImplementedError

    @abstractmethod
    def embeddings(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs as a transformer reads them, fp32: TEXT, padded as in training, and the others."""

    @abstractmethod
    def cut(self, encoders: Encoders, text: str) -> list[str]:
        """Warnings about a cleaned prompt that is truncated."""


def run_with_blocks(blocks: list[nn.Module], on_block: OnBlock, compute: Callable[[], Computed]) -> Computed:
    """The result of `compute`, which calls `on_block` before each of these blocks."""
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: on_block(index, len(blocks)))
        for index, block in enumerate(blocks)
    ]
    try:
        return compute()
    finally:
        for hook in hooks:
            hook.remove()


def without_embeddings(given: GivenTokens) -> Tensor:
    """The ids [1, S] of tokens for an encoder that reads nothing else. Raises ValueError if there are embeddings."""
    if given.embeddings:
        raise ValueError("This text encoder reads tokens only, and no embeddings in their place. Remove them.")
    return given.ids[None]
