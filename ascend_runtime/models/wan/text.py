"""Cleans, tokenises and encodes Wan's prompts with UMT5."""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.bounded import read_bounded
from ...checkpoints.faults import as_value_error
from ...checkpoints.tokenizers import (
    JSON,
    MAX_SPIECE_BYTES,
    SPIECE,
    TOKENIZER_ADVICE,
    check_class,
    check_spiece,
    tokenizer_json,
    tokenizer_model,
)
from ...errors import coded_error
from ..family import TEXT_ENCODER
from ..shared.text import (
    SHOWN_TOKENS,
    TEXT,
    Encoder,
    Encoders,
    GivenTokens,
    OnBlock,
    TextEncoding,
    TokenizerFile,
    run_with_blocks,
    without_embeddings,
)
from ..shared.tokenizers import JsonTokenizer, SentencePiece, Tokenizer, Tokens

MAX_TOKENS = 512  # of a prompt in Wan's training


class WanText(TextEncoding):
    def clean(self, text: str) -> str:
        """Fixes the encoding, unescapes HTML entities and collapses whitespace, like the original's tokenizer."""
        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()

    def tokenizer(self, part: str, found: Path | None, shard: Path) -> Tokenizer:
        return load_tokenizer(found, shard)

    def check_folder(self, part: str, folder: Path) -> None:
        check_class(folder)

    def advice(self, part: str) -> str:
        return TOKENIZER_ADVICE

    def embeddings_in(self, part: str, model: nn.Module) -> int:
        return model.shared.num_embeddings

    def units(self, part: str, model: nn.Module) -> list[nn.Module]:
        return [model.shared, *model.encoder.block]

    def encode(self, encoders: Encoders, text: str, on_block: OnBlock) -> dict[str, Tensor]:
        """TEXT [1, tokens, D], with at most 512 tokens."""
        tokens = encoders[TEXT_ENCODER].tokenizer(text, truncation=True, max_length=MAX_TOKENS)
        return {TEXT: _hidden(encoders[TEXT_ENCODER].model, tokens, on_block)}

    def encode_tokens(self, part: str, encoder: Encoder, given: GivenTokens, on_block: OnBlock) -> dict[str, Tensor]:
        """TEXT [1, length, D]: the model was trained with zeros after the end."""
        ids = without_embeddings(given)[:, : given.length]
        return {TEXT: _hidden(encoder.model, Tokens(ids, torch.ones_like(ids)), on_block)}

    def tokenizer_file(self, part: str, found: Path | None, shard: Path) -> TokenizerFile:
        """The sentencepiece model if there is one, as the authors and core ComfyUI use it."""
        tokenizer = load_tokenizer(found, shard)  # raises if there is none, or it is damaged
        pieces = _sentencepiece_in(found)
        return TokenizerFile(pieces is not None, (pieces or tokenizer).content)

    def embeddings(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """TEXT [1, 512, D], with zeros after the prompt's end.

        The encoder runs without padding: with padding, its mask would hide it from the prompt's tokens anyway.
        """
        hidden = encoded[TEXT].float()
        return {TEXT: F.pad(hidden, (0, 0, 0, MAX_TOKENS - hidden.shape[1]))}

    def cut(self, encoders: Encoders, text: str) -> list[str]:
        tokenizer = encoders[TEXT_ENCODER].tokenizer
        read = tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids[0].tolist()
        if len(read) < MAX_TOKENS:
            return []
        count = tokenizer(text, truncation=False).input_ids.shape[1]
        if count <= MAX_TOKENS:
            return []
        end = tokenizer.decode(read[-1 - SHOWN_TOKENS : -1])  # without the end token
        return [
            f"The prompt has {count} tokens, but Wan reads {MAX_TOKENS}: the text after '... {end.strip()}' is cut "
            "off. Shorten the prompt."
        ]


def _hidden(model: nn.Module, tokens: Tokens, on_block: OnBlock) -> Tensor:
    """The encoder's output [1, tokens, D] on the CPU."""
    tokens = tokens.to(model.device)

    def compute() -> Tensor:
        return model(tokens.input_ids, tokens.attention_mask).last_hidden_state.cpu()

    return run_with_blocks(list(model.encoder.block), on_block, compute)


def load_tokenizer(found: Path | None, shard: Path) -> Tokenizer:
    """The tokenizer in a folder, or in the text encoder's file."""
    if found is None:
        raise coded_error(
            "AV-1409",
            f"{shard} contains no tokenizer, and there is none next to it. Put the folder google/umt5-xxl of "
            "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) next to the file, or use ComfyUI's "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged), which contains one.",
        )
    if not found.is_file() and not found.is_dir():
        raise coded_error("AV-1409", f"{found} does not exist. Put the tokenizer's folder next to the text encoder.")
    if found.is_dir():
        check_class(found)
        if (found / JSON).is_file():
            return JsonTokenizer(tokenizer_json(found / JSON), found)
    pieces = _sentencepiece_in(found)
    if pieces is not None:
        return pieces
    raise coded_error(
        "AV-1409",
        f"{found} has neither {JSON} nor {SPIECE}; a T5 tokenizer needs one of them. Download google/umt5-xxl of "
        "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) into it.",
    )


def _sentencepiece_in(found: Path) -> SentencePiece | None:
    """The sentencepiece model in the text encoder's file, or in a folder; None if a folder has none."""
    if found.is_file():
        model = tokenizer_model(found)
        with as_value_error(found, "its tokenizer", "AV-1411"):
            check_spiece(model)
            return SentencePiece(model)
    if not (found / SPIECE).is_file():
        return None
    with as_value_error(found / SPIECE, "the tokenizer in it", "AV-1411"):
        model = read_bounded(found / SPIECE, MAX_SPIECE_BYTES)
        check_spiece(model)
        return SentencePiece(model)
