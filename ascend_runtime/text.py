"""A prompt as the Wan networks want it: cleaned, tokenised and encoded."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Callable

import ftfy
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

MAX_TOKENS = 512  # what Wan was trained with


@dataclass
class Tokens:
    """Of one prompt, [1, tokens] each."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))


class SentencePiece:
    """A tokenizer from a sentencepiece model alone, called as transformers' are, with the end after each prompt."""

    def __init__(self, model: bytes):
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"The file's sentencepiece model is damaged ({error}). Download it again.") from None

    def __call__(self, text: str, *, max_length: int, truncation: bool, return_tensors: str) -> Tokens:
        assert truncation and return_tensors == "pt", "what encode_text asks of any tokenizer"
        tokens = torch.tensor([[*self._processor.encode(text)[: max_length - 1], self._processor.eos_id()]])
        return Tokens(tokens, torch.ones_like(tokens))


def clean(text: str) -> str:
    """Mended encoding, plain entities, single spaces: as the original's tokenizer cleans its prompts."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def encode_text(model, tokenizer, text: str, on_block: Callable[[int, int], None]) -> Tensor:
    """The embedding [1, 512, D] of a prompt in fp32 on the CPU, zeros behind its end.

    Only the prompt's own tokens go through the network: its mask hides the padding from them anyway.
    on_block: told before each of the encoder's blocks which of how many it is.
    """
    tokens = tokenizer(clean(text), truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(model.device)
    blocks = model.encoder.block
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: on_block(index, len(blocks)))
        for index, block in enumerate(blocks)
    ]
    try:
        hidden = model(tokens.input_ids, tokens.attention_mask).last_hidden_state.float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    embedding = torch.zeros(1, MAX_TOKENS, hidden.shape[-1])
    embedding[:, : hidden.shape[1]] = hidden
    return embedding
