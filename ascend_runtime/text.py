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

from .checkpoints.faults import usable

MAX_TOKENS = 512  # what Wan was trained with
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

    def __call__(self, text: str, *, max_length: int, truncation: bool, return_tensors: str) -> Tokens:
        assert truncation and return_tensors == "pt", "what encode_text asks of any tokenizer"
        return _tokens([*self._processor.encode(text)[: max_length - 1], self._processor.eos_id()])


class JsonTokenizer:
    """A tokenizer from a tokenizer.json, called as transformers' are. What follows each prompt is in the file."""

    def __init__(self, content: bytes, file: Path):
        """content: of `file`, which errors name. Raises ValueError for one that cannot be used."""
        self._file = file
        with usable(file, "the tokenizer in it"):
            self._tokenizer = Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()

    def __call__(self, text: str, *, max_length: int, truncation: bool, return_tensors: str) -> Tokens:
        assert truncation and return_tensors == "pt", "what encode_text asks of any tokenizer"
        with usable(self._file, "the tokenizer in it"):
            self._tokenizer.enable_truncation(max_length)
            return _tokens(self._tokenizer.encode(text).ids)


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


def embedding_of(hidden: Tensor) -> Tensor:
    """The embedding [1, 512, D] of a prompt in fp32, zeros behind its end.

    Only the prompt's own tokens went through the network: its mask hides the padding from them anyway.
    """
    return F.pad(hidden.float(), (0, 0, 0, MAX_TOKENS - hidden.shape[1]))


class KnownPrompts:
    """What the encoder made of the last prompts; of more than KNOWN_PROMPTS, the one goes first that was
    asked for the longest ago.

    Each is found by all that decides the result, its whole text included: two are never taken for each other.
    """

    def __init__(self):
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        return self._known.get(key)

    def keep(self, key: Hashable, hidden: Tensor) -> None:
        """From now on it is the one that was asked for last."""
        self._known[key] = hidden
        self._known.move_to_end(key)
        if len(self._known) > KNOWN_PROMPTS:
            self._known.popitem(last=False)
