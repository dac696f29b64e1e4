"""A prompt as the Wan networks want it: cleaned, tokenised and encoded. The last ones are known from then on."""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Hashable

import ftfy
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from torch import Tensor

from ..checkpoints.faults import usable

MAX_TOKENS = 512  # what Wan was trained with
LAST_WORDS = 12  # tokens before a cut that are shown
KNOWN_PROMPTS = 16  # of UMT5-XXL 4 MB each at most in bfloat16, 8 in float32


@dataclass
class Tokens:
    """Of one prompt, [1, tokens] each."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))


class SentencePiece:
    """A tokenizer from a sentencepiece model, called as transformers' are, with the end after each prompt."""

    def __init__(self, model: bytes):
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"The file's sentencepiece model is damaged ({error}). Download it again.") from None
        if self._processor.eos_id() < 0:
            raise ValueError("the sentencepiece model has no token for a prompt's end")

    @property
    def size(self) -> int:
        """One more than the largest number of a token."""
        return self._processor.vocab_size()

    def __call__(
        self, text: str, *, truncation: bool, max_length: int | None = None, return_tensors: str = "pt"
    ) -> Tokens:
        assert return_tensors == "pt", "what is asked of any tokenizer here"
        last = max_length - 1 if truncation else None
        return _tokens([*self._processor.encode(text)[:last], self._processor.eos_id()])

    def decode(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens)


class JsonTokenizer:
    """A tokenizer from a tokenizer.json, called as transformers' are. What follows each prompt is in the file."""

    def __init__(self, content: bytes, file: Path):
        """content: of `file`, which errors name. Raises ValueError for one that cannot be used."""
        self._file = file
        with usable(file, "the tokenizer in it"):
            self._tokenizer = Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()

    @property
    def size(self) -> int:
        """One more than the largest number of a token, those that follow each prompt included."""
        with usable(self._file, "the tokenizer in it"):
            around = self._tokenizer.encode("").ids
            return 1 + max([*self._tokenizer.get_vocab(with_added_tokens=True).values(), *around], default=-1)

    def __call__(
        self, text: str, *, truncation: bool, max_length: int | None = None, return_tensors: str = "pt"
    ) -> Tokens:
        assert return_tensors == "pt", "what is asked of any tokenizer here"
        with usable(self._file, "the tokenizer in it"):
            if truncation:
                self._tokenizer.enable_truncation(max_length)
            else:
                self._tokenizer.no_truncation()
            return _tokens(self._tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        with usable(self._file, "the tokenizer in it"):
            return self._tokenizer.decode(tokens)


def _tokens(ids: list[int]) -> Tokens:
    tokens = torch.tensor([ids])
    return Tokens(tokens, torch.ones_like(tokens))


def clean(text: str) -> str:
    """Mended encoding, plain entities, single spaces: as the original's tokenizer cleans its prompts."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def encode_text(model, tokenizer, text: str, on_block: Callable[[int, int], None]) -> Tensor:
    """What the encoder makes of a clean prompt, [1, tokens, D] in its dtype, on the CPU; 512 tokens at most.

    on_block: told before each of the encoder's blocks which of how many it is.
    """
    tokens = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(model.device)
    blocks = model.encoder.block
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: on_block(index, len(blocks)))
        for index, block in enumerate(blocks)
    ]
    try:
        return model(tokens.input_ids, tokens.attention_mask).last_hidden_state.cpu()
    finally:
        for hook in hooks:
            hook.remove()


def cut_of(tokenizer, text: str) -> list[str]:
    """What is to be said of a clean prompt that has more tokens than are read: how many, and where it is cut."""
    read = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids[0].tolist()
    if len(read) < MAX_TOKENS:
        return []
    count = tokenizer(text, truncation=False, return_tensors="pt").input_ids.shape[1]
    if count <= MAX_TOKENS:
        return []
    end = tokenizer.decode(read[-1 - LAST_WORDS : -1])  # without the end token
    return [
        f"The prompt has {count} tokens, and Wan reads {MAX_TOKENS}: what comes after '... {end.strip()}' is cut off. "
        "Shorten the prompt."
    ]


def embedding_of(hidden: Tensor) -> Tensor:
    """The embedding [1, 512, D] of a prompt in fp32, zeros behind its end.

    Only the prompt's own tokens went through the network: its mask hides the padding from them anyway.
    """
    return F.pad(hidden.float(), (0, 0, 0, MAX_TOKENS - hidden.shape[1]))


@dataclass(frozen=True)
class Encoded:
    """hidden: what the encoder made of a prompt. warnings: what is to be said of it."""

    hidden: Tensor
    warnings: list[str]


class KnownPrompts:
    """What the encoder made of the last prompts; of more than KNOWN_PROMPTS, the one goes first that was
    asked for the longest ago.

    Each is found by all that decides the result, its whole text included: two are never taken for each other.
    """

    def __init__(self):
        self._known: OrderedDict[Hashable, Encoded] = OrderedDict()

    def get(self, key: Hashable) -> Encoded | None:
        return self._known.get(key)

    def keep(self, key: Hashable, encoded: Encoded) -> None:
        """From now on it is the one that was asked for last."""
        self._known[key] = encoded
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_PROMPTS:
            self._known.popitem(last=False)
