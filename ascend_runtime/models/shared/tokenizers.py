"""Tokenizers from a sentencepiece model or a tokenizer.json, without running code of a model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Rules
from torch import Tensor

from ...checkpoints.faults import as_value_error


@dataclass
class Tokens:
    """The tokens of one prompt, both [1, tokens]."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))


class Tokenizer(Protocol):
    """size: one more than the largest token id. content: of its file."""

    size: int
    content: bytes

    def __call__(self, text: str, *, truncation: bool, max_length: int | None = None) -> Tokens:
        """The tokens of a prompt; with truncation, at most max_length, including the end tokens."""

    def decode(self, tokens: list[int]) -> str: ...


class SentencePiece:
    """A tokenizer from a sentencepiece model, with the interface of transformers. Adds the end token to each prompt."""

    def __init__(self, model: bytes):
        self.content = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"The file's sentencepiece model is damaged ({error}). Download it again.") from None
        if self._processor.eos_id() < 0:
            raise ValueError("the sentencepiece model has no end token")

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return self._processor.vocab_size()

    def __call__(
        self, text: str, *, truncation: bool, max_length: int | None = None
    ) -> Tokens:
        last = max_length - 1 if truncation else None
        return _tokens([*self._processor.encode(text)[:last], self._processor.eos_id()])

    def decode(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens)


class JsonTokenizer:
    """A tokenizer from a tokenizer.json, with the interface of transformers. The file defines the end tokens."""

    def __init__(self, content: bytes, file: Path):
        """content: of `file`, which errors name. Raises ValueError for invalid content."""
        self._file, self.content = file, content
        with as_value_error(file, "the tokenizer in it", "AV-1411"):
            self._tokenizer = Rules.from_buffer(content)
            self._tokenizer.no_padding()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens."""
        with as_value_error(self._file, "the tokenizer in it", "AV-1411"):
            return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """One more than the largest token id, including the end tokens."""
        with as_value_error(self._file, "the tokenizer in it", "AV-1411"):
            around = self._tokenizer.encode("").ids
            return 1 + max([*self.vocabulary.values(), *around], default=-1)

    def __call__(
        self, text: str, *, truncation: bool, max_length: int | None = None
    ) -> Tokens:
        with as_value_error(self._file, "the tokenizer in it", "AV-1411"):
            if truncation:
                self._tokenizer.enable_truncation(max_length)
            else:
                self._tokenizer.no_truncation()
            return _tokens(self._tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        with as_value_error(self._file, "the tokenizer in it", "AV-1411"):
            return self._tokenizer.decode(tokens)


def _tokens(ids: list[int]) -> Tokens:
    tokens = torch.tensor([ids])
    return Tokens(tokens, torch.ones_like(tokens))
