"""The files of a text encoder's tokenizer: which is read, and what it may hold.

A tokenizer's folder may come with a class of its own in Python, which transformers would run after a question. Here
its tokenizer.json, or its sentencepiece model, is all that is read: libraries without code of the folder make of it
what every UMT5 has.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from .bounded import parse_json, read_bounded, read_json
from .faults import shown, usable

JSON, SPIECE = "tokenizer.json", "spiece.model"
SETTINGS = ("tokenizer_config.json", "config.json")  # that may name a class
# What transformers calls what it makes of these files, in all its versions.
CLASSES = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast", "PreTrainedTokenizerFast",
           "TokenizersBackend")  # fmt: skip
INSTEAD = "Take the tokenizer of Wan-AI/Wan2.1-T2V-1.3B, google/umt5-xxl, in its place."
LONGEST_JSON = 32 * 2**20  # bytes; that of google/umt5-xxl has 17 MB
LONGEST_SPIECE = 16 * 2**20  # bytes; google/umt5-xxl's has 4.5 MB
MOST_PIECES = 400_000  # google/umt5-xxl has 256,300
LONGEST_PIECE = 256  # characters
LONGEST_PIECES = 8 * 2**20  # characters of all; each may take a node of a tree


def check_class(folder: Path) -> None:
    """Raises ValueError for a tokenizer whose settings name code of its own, or a class that is not UMT5's."""
    for file in (folder / name for name in SETTINGS):
        settings = read_json(file) if file.is_file() else {}
        if settings.get("auto_map"):
            raise ValueError(f"{file} names code of the folder's own (auto_map), which is never run. {INSTEAD}")
        named = settings.get("tokenizer_class")
        if named is not None and named not in CLASSES:
            raise ValueError(f"{file} names the class {shown(repr(named))}, which is not UMT5's. {INSTEAD}")


def tokenizer_json(file: Path) -> bytes:
    """The content of a tokenizer.json. Raises ValueError where it is no UMT5's, or larger than such a one."""
    content = read_bounded(file, LONGEST_JSON)
    with usable(file, "its tokenizer"):
        parts = parse_json(content)
        if not isinstance(parts, dict) or not _is_model(parts.get("model")):
            raise ValueError("it holds no vocabulary of a UMT5")
        _check_characters(parts.get("normalizer"))
    return content


def _check_characters(normalizer: Any) -> None:
    """Raises ValueError for a table of characters which is none: sentencepiece's, a number of bytes and as many of a
    tree. The library ends in a panic there."""
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            table = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
            tree = int.from_bytes(table[:4], "little")
            if table and (len(table) < 4 or tree % 4 or tree > len(table) - 4):
                raise ValueError("its table of characters is damaged")


def _is_model(model: Any) -> bool:
    """Whether it has a list of pieces with their scores, none too long, and not too many."""
    if not isinstance(model, dict) or model.get("type", "Unigram") != "Unigram":
        return False
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not 0 < len(vocab) <= MOST_PIECES:
        return False
    pieces = [one[0] for one in vocab if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str)]
    lengths = list(map(len, pieces))
    return len(pieces) == len(vocab) and max(lengths) <= LONGEST_PIECE and sum(lengths) <= LONGEST_PIECES
