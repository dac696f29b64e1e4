"""Wan's prompts: cleaned, tokenised and encoded by UMT5."""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.bounded import read_bounded
from ...checkpoints.faults import usable
from ...checkpoints.tokenizers import (
    JSON,
    LONGEST_SPIECE,
    SPIECE,
    check_class,
    check_spiece,
    tokenizer_json,
    tokenizer_model,
)
from ..family import TEXT_ENCODER
from ..shared.text import TEXT, Encoders, OnBlock, TextEncoding, run_with_blocks
from ..shared.tokenizers import JsonTokenizer, SentencePiece, Tokenizer

MAX_TOKENS = 512  # that Wan was trained with
LAST_WORDS = 12  # tokens before a cut that are shown


class WanText(TextEncoding):
    def clean(self, text: str) -> str:
        """With mended encoding, plain entities and single spaces, as the original's tokenizer cleans its prompts."""
        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()

    def tokenizer(self, part: str, found: Path | None, shard: Path) -> Tokenizer:
        return find_tokenizer(found, shard)

    def embeddings_in(self, part: str, model: nn.Module) -> int:
        return model.shared.num_embeddings

    def units(self, part: str, model: nn.Module) -> list[nn.Module]:
        return [model.shared, *model.encoder.block]

    def encode(self, encoders: Encoders, text: str, on_block: OnBlock) -> dict[str, Tensor]:
        """TEXT [1, tokens, D], at most 512 tokens."""
        model, tokenizer = encoders[TEXT_ENCODER].model, encoders[TEXT_ENCODER].tokenizer
        tokens = tokenizer(text, truncation=True, max_length=MAX_TOKENS).to(model.device)

        def compute() -> Tensor:
            return model(tokens.input_ids, tokens.attention_mask).last_hidden_state.cpu()

        return {TEXT: run_with_blocks(list(model.encoder.block), on_block, compute)}

    def embeddings(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """TEXT [1, 512, D], zeros after the prompt's end.

        Only the prompt's own tokens went through the network: its mask hides the padding from them anyway.
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
        end = tokenizer.decode(read[-1 - LAST_WORDS : -1])  # without the end token
        return [
            f"The prompt has {count} tokens, and Wan reads {MAX_TOKENS}: what comes after '... {end.strip()}' is cut "
            "off. Shorten the prompt."
        ]


def find_tokenizer(found: Path | None, shard: Path) -> Tokenizer:
    """A folder's tokenizer, or the one that the text encoder's file brings along."""
    if found is None:
        raise ValueError(
            f"{shard} has no tokenizer in it, and none lies beside it. Put the folder google/umt5-xxl of "
            "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) beside the file, or take ComfyUI's "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors (Comfy-Org/Wan_2.1_ComfyUI_repackaged), which has one."
        )
    if found.is_file():
        model = tokenizer_model(found)
        with usable(found, "its tokenizer"):
            check_spiece(model)
            return SentencePiece(model)
    if not found.is_dir():
        raise ValueError(f"{found} does not exist; the text encoder needs the tokenizer folder beside it.")
    check_class(found)
    if (found / JSON).is_file():
        return JsonTokenizer(tokenizer_json(found / JSON), found)
    if (found / SPIECE).is_file():
        with usable(found / SPIECE, "the tokenizer in it"):
            model = read_bounded(found / SPIECE, LONGEST_SPIECE)
            check_spiece(model)
            return SentencePiece(model)
    raise ValueError(
        f"{found} has neither {JSON} nor {SPIECE}, of which a T5 tokenizer needs one. Download google/umt5-xxl of "
        "Wan-AI/Wan2.1-T2V-1.3B (Hugging Face or ModelScope) into it."
    )
