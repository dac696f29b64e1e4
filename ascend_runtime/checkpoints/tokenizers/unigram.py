"""Reads and checks the tokenizer of a UMT5: a tokenizer.json with a Unigram model, or a sentencepiece model."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import coded_error
from ..bounded import parse_json, read_bounded
from ..faults import as_value_error, shown
from ..opening import open_tensors
from ..renaming import is_tokenizer
from .steps import (
    MAX_PIECE_LENGTH,
    MAX_PIECES,
    MAX_TOKENIZER_JSON_BYTES,
    MAX_VOCABULARY_LENGTH,
    check_added,
    check_template,
    steps_in,
)

SPIECE = "spiece.model"
MAX_SPIECE_BYTES = 16 * 2**20  # google/umt5-xxl's has 4.5 MB
# The allowed steps of each part of the file: those of T5's tokenizers as transformers writes them, and similar ones.
# Others, or more of these, could make a prompt very long or take very long.
TOKENIZER_STEPS = {
    "normalizer": ("Precompiled", "Replace", "Prepend", "Strip", "StripAccents", "Lowercase", "Nmt", "NFC", "NFD",
                   "NFKC", "NFKD"),
    "pre_tokenizer": ("WhitespaceSplit", "Whitespace", "Metaspace", "Punctuation", "Digits"),
    "post_processor": ("TemplateProcessing",),
    "decoder": ("Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"),
}  # fmt: skip
MAX_STEP_LENGTH = 8  # characters that a step matches or inserts; also the factor by which a part may lengthen a text
MAX_CHARACTER_BYTES = 64  # that the character map makes from one character; in Unicode's NFKC, 33
LINEAR_REGEX = re.compile(r"( |\u2581|\\s)([+]|\{\d,\d?\})?")  # regular expressions that run in linear time
FIXED = {1: 8, 5: 4}  # bytes of protobuf's fixed-length wire types


def tokenizer_json(file: Path) -> bytes:
    """The content of a tokenizer.json. Raises ValueError if it is not a UMT5 tokenizer, or too large for one."""
    content = read_bounded(file, MAX_TOKENIZER_JSON_BYTES)
    with as_value_error(file, "its tokenizer", "AV-1411"):
        parts = parse_json(content)
        if not isinstance(parts, dict) or not _is_model(parts.get("model")):
            raise ValueError("it does not hold a UMT5 vocabulary")
        check_added(parts.get("added_tokens") or [])
        for part, allowed in TOKENIZER_STEPS.items():
            _check_steps(part, list(steps_in(part, parts.get(part), allowed, "T5")))
    return content


def _check_steps(part: str, steps: list[dict]) -> None:
    """Raises ValueError for steps that can make a text very long, or take very long."""
    tables = [step for step in steps if step["type"] == "Precompiled"]
    if len(tables) > 1:
        raise ValueError(f"its {part} has {len(tables)} character maps")
    for step in steps:
        check = CHECKS.get(step["type"])
        if check is not None:
            check(step)
    longer = math.prod(max(1, len(step["content"])) for step in steps if step["type"] == "Replace")
    if longer > MAX_STEP_LENGTH:
        raise ValueError(f"its {part} makes a text {longer} times as long")


def _check_words(*words: Any) -> None:
    if not all(isinstance(word, str) and len(word) <= MAX_STEP_LENGTH for word in words):
        raise ValueError(f"one of its steps inserts something other than at most {MAX_STEP_LENGTH} characters")


def _check_replacement(step: dict) -> None:
    pattern = step.get("pattern")
    ((kind, sought),) = pattern.items() if isinstance(pattern, dict) and len(pattern) == 1 else [("", "")]
    _check_words(step.get("content"), sought)
    if not sought or kind not in ("String", "Regex") or kind == "Regex" and not LINEAR_REGEX.fullmatch(sought):
        raise ValueError(f"one of its steps replaces {shown(repr(sought))}, which no T5 tokenizer does")


def _check_ends(step: dict) -> None:
    """Checks the decoder's Strip; the normalizer's has no numbers."""
    if not all(type(step.get(end, 0)) is int and 0 <= step.get(end, 0) <= MAX_STEP_LENGTH for end in ("start", "stop")):
        raise ValueError(f"one of its steps removes more than {MAX_STEP_LENGTH} characters")


def _check_characters(step: dict) -> None:
    check_table(base64.b64decode(step.get("precompiled_charsmap") or "", validate=True))


def check_table(table: bytes) -> None:
    """Raises ValueError for an invalid character map, or one that makes a character very long.

    It is sentencepiece's: the size of a trie in bytes, the trie, and the replacements. The tokenizers library panics on
    an invalid one.
    """
    tree = int.from_bytes(table[:4], "little")
    if table and (len(table) < 4 or tree % 4 or tree > len(table) - 4):
        raise ValueError("its character map is damaged")
    if max(map(len, table[4 + tree :].split(b"\0"))) > MAX_CHARACTER_BYTES:
        raise ValueError(f"its character map makes more than {MAX_CHARACTER_BYTES} bytes from one character")


CHECKS = {
    "Precompiled": _check_characters,
    "Replace": _check_replacement,
    "Prepend": lambda step: _check_words(step.get("prepend")),
    "Strip": _check_ends,
    "TemplateProcessing": check_template,
}


def _is_model(model: Any) -> bool:
    """Whether a model has a list of pieces with scores, within the bounds."""
    if not isinstance(model, dict) or model.get("type", "Unigram") != "Unigram":
        return False
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not 0 < len(vocab) <= MAX_PIECES:
        return False
    pieces = [one[0] for one in vocab if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)]
    lengths = list(map(len, pieces))
    return len(pieces) == len(vocab) and max(lengths) <= MAX_PIECE_LENGTH and sum(lengths) <= MAX_VOCABULARY_LENGTH


def check_spiece(model: bytes) -> None:
    """Raises ValueError for a sentencepiece model, a protobuf message, with an invalid character map:
    normalizer_spec.precompiled_charsmap (sentencepiece_model.proto)."""
    for spec in _fields(model, 3):
        for table in _fields(spec, 2):
            check_table(table)


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The values of a message's length-delimited fields with this number."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, length = tag & 7, 0
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in FIXED:
            length = FIXED[kind]
        elif kind == 2:
            length, at = _varint(message, at)
        else:
            raise ValueError("the sentencepiece model is damaged")
        if kind == 2 and tag >> 3 == wanted:
            yield message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(a varint: 7 bits in each byte, the high bit set in all but the last; the position after it)"""
    number = 0
    for place in range(10):
        byte = message[at + place] if at + place < len(message) else 0
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise ValueError("the sentencepiece model is damaged")


def tokenizer_model(file: Path) -> bytes:
    """The sentencepiece model in a text encoder's file."""
    with open_tensors(file) as tensors:
        name = next(filter(is_tokenizer, tensors.shapes))
        count, dtype = math.prod(tensors.shapes[name]), tensors.dtype(name)
        if count > MAX_SPIECE_BYTES or dtype != torch.uint8:
            raise coded_error("AV-1411", f"{file} holds {name} as {count} numbers of {dtype}; it must have at most "
                             f"{MAX_SPIECE_BYTES} bytes. Download it again.")  # fmt: skip
        return tensors.read(name).numpy().tobytes()
