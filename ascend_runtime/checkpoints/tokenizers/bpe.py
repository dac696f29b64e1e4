"""Reads and checks tokenizers that are byte-level BPEs, as those of Llama 3 and of CLIP are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..bounded import parse_json, read_bounded
from ..faults import as_value_error, shown
from .steps import (
    MAX_PIECE_LENGTH,
    MAX_PIECES,
    MAX_TOKENIZER_JSON_BYTES,
    MAX_VOCABULARY_LENGTH,
    check_added,
    check_template,
    steps_in,
)

VOCABULARY, MERGES = "vocab.json", "merges.txt"
# The allowed steps of each part of the file.
BPE_STEPS = {
    "normalizer": ("NFC", "Replace", "Lowercase"),
    "pre_tokenizer": ("Split", "ByteLevel"),
    "post_processor": ("TemplateProcessing", "RobertaProcessing", "ByteLevel"),
    "decoder": ("ByteLevel",),
}
# The regular expressions that split a text into words, of the published files: others might take very long.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
WORDS = (LLAMA_3_WORDS, CLIP_WORDS, rf"<\|startoftext\|>|<\|endoftext\|>|{CLIP_WORDS}")
WHITESPACE = r"\s+"  # CLIP replaces it by one space


def bpe_json(file: Path) -> bytes:
    """The content of a tokenizer.json. Raises ValueError if it is not a byte-level BPE, or too large for one."""
    content = read_bounded(file, MAX_TOKENIZER_JSON_BYTES)
    with as_value_error(file, "its tokenizer", "AV-1411"):
        _check(parse_json(content))
    return content


def clip_json(folder: Path) -> bytes:
    """The content of a tokenizer.json with the vocabulary and merges of CLIP's tokenizer in `folder`.

    Its steps are those of transformers' CLIPTokenizer.
    """
    contents = {name: read_bounded(folder / name, MAX_TOKENIZER_JSON_BYTES) for name in (VOCABULARY, MERGES)}
    with as_value_error(folder / VOCABULARY, "its vocabulary", "AV-1411"):
        vocabulary = parse_json(contents[VOCABULARY])
        numbers = [vocabulary[token] for token in (CLIP_START, CLIP_END)]
    with as_value_error(folder / MERGES, "the merges in it", "AV-1411"):
        lines = contents[MERGES].decode().splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    parts = _clip_parts(vocabulary, merges, numbers)
    with as_value_error(folder, "the tokenizer in it", "AV-1411"):
        _check(parts)
    return json.dumps(parts).encode()


def _clip_parts(vocabulary: dict[str, int], merges: list[str], numbers: list[int]) -> dict[str, Any]:
    """numbers: of the first and the last token of a text."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = {"type": "Split", "pattern": {"Regex": WORDS[-1]}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **plain}
                         for number, token in zip(numbers, (CLIP_START, CLIP_END))],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": WHITESPACE}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": {"type": "RobertaProcessing", "sep": [CLIP_END, numbers[1]], "cls": [CLIP_START, numbers[0]],
                           "trim_offsets": False, "add_prefix_space": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": CLIP_END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def _check(parts: Any) -> None:
    if not isinstance(parts, dict) or not _is_bpe(parts.get("model")):
        raise ValueError("it does not hold the vocabulary of a byte-level BPE")
    check_added(parts.get("added_tokens") or [])
    for part, allowed in BPE_STEPS.items():
        for step in steps_in(part, parts.get(part), allowed, "Llama 3 or CLIP"):
            _check_step(step)


def _check_step(step: dict) -> None:
    pattern = step.get("pattern")
    if step["type"] == "Split" and pattern not in [{"Regex": words} for words in WORDS]:
        raise ValueError(f"it splits words at {shown(repr(pattern))}, which no Llama 3 or CLIP tokenizer does")
    if step["type"] == "Replace" and (pattern, step.get("content")) != ({"Regex": WHITESPACE}, " "):
        raise ValueError(f"it replaces {shown(repr(pattern))}, which no CLIP tokenizer does")
    if step["type"] == "TemplateProcessing":
        check_template(step)


def _is_bpe(model: Any) -> bool:
    """Whether a model has pieces with numbers, and merges, within the bounds."""
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return False
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return False
    sizes = [len(piece) for piece in vocab]
    return (
        0 < len(vocab) <= MAX_PIECES and len(merges) <= MAX_PIECES
        and all(type(number) is int and 0 <= number < 2**31 for number in vocab.values())
        and max(sizes) <= MAX_PIECE_LENGTH and sum(sizes) <= MAX_VOCABULARY_LENGTH
    )  # fmt: skip
