"""How prompts are encoded: what the runtime asks of a family's text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .tokenizers import Tokenizer

OnBlock = Callable[[int, int], None]  # called before each block: its number, from 0, and how many there are


@dataclass(frozen=True)
class Encoder:
    """A loaded text encoder and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer


Encoders = dict[str, Encoder]  # by part, the main one first
TEXT, POOLED = "text", "pooled"  # results: embeddings [1, tokens, D] of the tokens, and one vector [1, D] of the prompt


class TextEncoding(ABC):
    """What a family makes of a prompt."""

    @abstractmethod
    def clean(self, text: str) -> str:
        """The prompt as it is tokenised."""

    @abstractmethod
    def tokenizer(self, part: str, found: Path | None, shard: Path) -> Tokenizer:
        """The tokenizer of a text encoder. found: its folder, or the file that has it. shard: the encoder's first file.

        Raises ValueError, which says where it can be had, where there is none or it cannot be used.
        """

    @abstractmethod
    def embeddings_in(self, part: str, model: nn.Module) -> int:
        """The number of tokens that an encoder knows."""

    @abstractmethod
    def units(self, part: str, model: nn.Module) -> list[nn.Module]:
        """What FSDP gathers at once, in the order in which they begin."""

    @abstractmethod
    def encode(self, encoders: Encoders, text: str, on_block: OnBlock) -> dict[str, Tensor]:
        """The encoders' results of a clean prompt, without padding, in their dtype, on the CPU."""

    @abstractmethod
    def embeddings(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same as a network reads them, fp32: TEXT, padded as it was in training, and what else there is."""

    @abstractmethod
    def cut(self, encoders: Encoders, text: str) -> list[str]:
        """What a user should know of a clean prompt that is longer than what is read, in sentences."""


def run_with_blocks(blocks: list[nn.Module], on_block: OnBlock, compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`, during which these blocks announce themselves."""
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: on_block(index, len(blocks)))
        for index, block in enumerate(blocks)
    ]
    try:
        return compute()
    finally:
        for hook in hooks:
            hook.remove()
