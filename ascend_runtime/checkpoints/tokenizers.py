"""The files of a text encoder's tokenizer: which is read, and what it may hold.

A tokenizer's folder may come with a class of its own in Python, which transformers would run after a question. Here
its tokenizer.json, or its sentencepiece model, is all that is read: libraries without code of the folder make of it
what every UMT5 has.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .bounded import parse_json, read_bounded, read_json
from .faults import shown, usable
from .formats.tensor_files import open_tensors
from .renaming import is_tokenizer

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
MOST_ADDED = 1000  # further tokens; google/umt5-xxl has 300
# The steps of T5's tokenizers as transformers writes them, and their like: by the part of the file, the key of the
# steps in a Sequence, and the types. Others, and more of these, could make much of a prompt, or take long for it.
STEPS = {
    "normalizer": ("normalizers", ("Precompiled", "Replace", "Prepend", "Strip", "StripAccents", "Lowercase", "Nmt",
                                   "NFC", "NFD", "NFKC", "NFKD")),
    "pre_tokenizer": ("pretokenizers", ("WhitespaceSplit", "Whitespace", "Metaspace", "Punctuation", "Digits")),
    "post_processor": ("processors", ("TemplateProcessing",)),
    "decoder": ("decoders", ("Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")),
}  # fmt: skip
MOST_STEPS = 16  # of a part, Sequences included
LONGEST_WORDS = 8  # characters that a step looks for, or puts in; and how much longer all of a part may make a text
LONGEST_CHARACTER = 64  # bytes that the table of characters makes of one; of Unicode's NFKC it is 33
PATTERN = re.compile(r"( |\u2581|\\s)([+]|\{\d,\d?\})?")  # regular expressions whose time grows as the text does
MOST_IN_A_TEMPLATE = 8
FIXED = {1: 8, 5: 4}  # bytes of protobuf's numbers of a fixed length


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
        _check_added(parts.get("added_tokens") or [])
        for part in STEPS:
            _check_steps(part, list(_steps(part, parts.get(part))))
    return content


def _check_added(tokens: Any) -> None:
    if not isinstance(tokens, list) or len(tokens) > MOST_ADDED:
        raise ValueError(f"its added_tokens are no list of at most {MOST_ADDED}")
    words = [token.get("content") if isinstance(token, dict) else None for token in tokens]
    if not all(isinstance(word, str) and 0 < len(word) <= LONGEST_PIECE for word in words):
        raise ValueError(f"one of its added_tokens is no word of at most {LONGEST_PIECE} characters")


def _steps(part: str, given: Any) -> Iterator[dict]:
    """The steps of a part, those in Sequences one by one. Raises ValueError for what is none of a T5, and for many."""
    inner, types = STEPS[part]
    left, count = [] if given is None else [given], 0
    while left:
        step, count = left.pop(), count + 1
        named = step.get("type") if isinstance(step, dict) else None
        if count > MOST_STEPS:
            raise ValueError(f"its {part} has more than {MOST_STEPS} steps")
        if named == "Sequence" and isinstance(step.get(inner), list):
            left += step[inner][: MOST_STEPS + 1]
        elif named in types:
            yield step
        else:
            raise ValueError(f"its {part} has the step {shown(repr(named))}, which no T5 has")


def _check_steps(part: str, steps: list[dict]) -> None:
    """Raises ValueError for steps that can make much of a text, or take long for it."""
    tables = [step for step in steps if step["type"] == "Precompiled"]
    if len(tables) > 1:
        raise ValueError(f"its {part} has {len(tables)} tables of characters")
    for step in steps:
        check = CHECKS.get(step["type"])
        if check is not None:
            check(step)
    longer = math.prod(max(1, len(step["content"])) for step in steps if step["type"] == "Replace")
    if longer > LONGEST_WORDS:
        raise ValueError(f"its {part} makes a text {longer} times as long")


def _check_words(*words: Any) -> None:
    if not all(isinstance(word, str) and len(word) <= LONGEST_WORDS for word in words):
        raise ValueError(f"one of its steps puts in other than at most {LONGEST_WORDS} characters")


def _check_replacement(step: dict) -> None:
    pattern = step.get("pattern")
    ((kind, sought),) = pattern.items() if isinstance(pattern, dict) and len(pattern) == 1 else [("", "")]
    _check_words(step.get("content"), sought)
    if not sought or kind not in ("String", "Regex") or kind == "Regex" and not PATTERN.fullmatch(sought):
        raise ValueError(f"one of its steps replaces {shown(repr(sought))}, which no T5 does")


def _check_ends(step: dict) -> None:
    """Of the decoder's Strip; the normalizer's has no numbers."""
    if not all(type(step.get(end, 0)) is int and 0 <= step.get(end, 0) <= LONGEST_WORDS for end in ("start", "stop")):
        raise ValueError(f"one of its steps takes off more than {LONGEST_WORDS} characters")


def _check_template(step: dict) -> None:
    """What stands around each prompt: a few tokens."""
    tokens = step.get("special_tokens")
    tokens = list(tokens.values()) if isinstance(tokens, dict) else [None]
    pieces = [step.get("single"), step.get("pair"), tokens]
    pieces += [token.get(key) if isinstance(token, dict) else None for token in tokens for key in ("ids", "tokens")]
    if not all(isinstance(one, list) and len(one) <= MOST_IN_A_TEMPLATE for one in pieces):
        raise ValueError(f"its template is not of lists of at most {MOST_IN_A_TEMPLATE} tokens")


def _check_characters(step: dict) -> None:
    check_table(base64.b64decode(step.get("precompiled_charsmap") or "", validate=True))


def check_table(table: bytes) -> None:
    """Raises ValueError for a table of characters which is none, or makes much of one: sentencepiece's, a number of
    bytes, as many of a tree, and what stands for characters. The library of tokenizer.json ends in a panic there."""
    tree = int.from_bytes(table[:4], "little")
    if table and (len(table) < 4 or tree % 4 or tree > len(table) - 4):
        raise ValueError("its table of characters is damaged")
    if max(map(len, table[4 + tree :].split(b"\0"))) > LONGEST_CHARACTER:
        raise ValueError(f"its table of characters makes more than {LONGEST_CHARACTER} bytes of one")


CHECKS = {
    "Precompiled": _check_characters,
    "Replace": _check_replacement,
    "Prepend": lambda step: _check_words(step.get("prepend")),
    "Strip": _check_ends,
    "TemplateProcessing": _check_template,
}


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


def check_spiece(model: bytes) -> None:
    """Raises ValueError for a sentencepiece model, a message of protobuf, whose own table of characters makes much of
    one: normalizer_spec.precompiled_charsmap (sentencepiece_model.proto)."""
    for spec in _fields(model, 3):
        for table in _fields(spec, 2):
            check_table(table)


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """What a message has under this number, of the fields that consist of bytes."""
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
    """(a number of 7 bits a byte, the last without the highest bit; where it ends)"""
    number = 0
    for place in range(10):
        byte = message[at + place] if at + place < len(message) else 0
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise ValueError("the sentencepiece model is damaged")


def tokenizer_model(file: Path) -> bytes:
    """The sentencepiece model that a file of a text encoder brings along."""
    with open_tensors(file) as tensors:
        name = next(filter(is_tokenizer, tensors.shapes))
        count, dtype = math.prod(tensors.shapes[name]), tensors.dtype(name)
        if count > LONGEST_SPIECE or dtype != torch.uint8:
            raise ValueError(f"{file} holds {name} as {count} numbers of {dtype}; that must be at most "
                             f"{LONGEST_SPIECE} bytes. Download it again.")  # fmt: skip
        return tensors.read(name).numpy().tobytes()
