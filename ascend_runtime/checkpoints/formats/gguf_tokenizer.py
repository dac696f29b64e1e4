"""Makes a sentencepiece model of the tokenizer in the header of a T5's GGUF file, which has the model's pieces, scores
and character map one by one.

The model is a protobuf message (sentencepiece_model.proto): pieces (1: text 1, score 2, type 3), settings of training
(2: model type 3, byte fallback 35, numbers of the unknown, the end and the padding piece 40 - 43), and of normalizing
(3: character map 2, a space in front 3, no double spaces 4).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

from ...errors import coded_error
from ..states import content_state
from .gguf_header import Header, read_header

MODEL, TOKENS, SCORES, TYPES, CHARACTERS = (
    f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type", "precompiled_charsmap")
)
ONE_BYTE = 100  # lengths and numbers below it are single bytes, with those of the fields around them
SHORT_PIECE, SHORT_END = struct.Struct("<4B"), struct.Struct("<BfBB")  # before and after its text
UNIGRAM, BYTE = 1, 6  # a type of model, and one of pieces
# The settings of training that have a piece's number, by the header's keys; -1: there is no such piece.
PIECE_NUMBERS = {
    40: "tokenizer.ggml.unknown_token_id", 41: "tokenizer.ggml.bos_token_id", 42: "tokenizer.ggml.eos_token_id",
    43: "tokenizer.ggml.padding_token_id",
}  # fmt: skip
T5_NUMBERS = {40: 2, 41: -1, 42: 1, 43: 0}  # those of T5
SPACE_KEYS = {3: "tokenizer.ggml.add_space_prefix", 4: "tokenizer.ggml.remove_extra_whitespaces"}


def sentencepiece_model(path: Path) -> bytes | None:
    """The tokenizer in a GGUF file; None: it has none of this kind. Raises ValueError, which names the file, for one
    that is damaged. Cached until the file changes."""
    return _model(path, content_state(path))


@lru_cache(maxsize=2)
def _model(path: Path, _: tuple) -> bytes | None:
    header = read_header(path)
    tokens, scores, types = header.texts(TOKENS), header.numbers(SCORES), header.numbers(TYPES)
    if header.fields.get(MODEL) != "t5" or tokens is None or scores is None or types is None:
        return None
    if not len(tokens) == len(scores) == len(types):
        raise coded_error(
            "AV-1411",
            f"{path} has a tokenizer of {len(tokens)} pieces, {len(scores)} scores and {len(types)} types, which must "
            "be as many. Download it again.",
        )
    pieces = b"".join(map(_piece, tokens, scores, types))
    return pieces + _field(2, _training(header, BYTE in types)) + _field(3, _normalizing(header))


def _piece(text: bytes, score: float, kind: int) -> bytes:
    """A piece. Those with little text, as nearly all are, are made at once, as there are many."""
    if len(text) < ONE_BYTE and 0 <= kind < ONE_BYTE:
        return SHORT_PIECE.pack(10, len(text) + 9, 10, len(text)) + text + SHORT_END.pack(21, score, 24, kind)
    return _field(1, _field(1, text) + struct.pack("<Bf", 21, score) + _number(3, int(kind)))


def _training(header: Header, has_bytes: bool) -> bytes:
    numbers = {field: header.fields.get(key, T5_NUMBERS[field]) for field, key in PIECE_NUMBERS.items()}
    own = b"".join(_number(field, number) for field, number in numbers.items() if type(number) is int)
    return _number(3, UNIGRAM) + _number(35, int(has_bytes)) + own


def _normalizing(header: Header) -> bytes:
    characters = bytes(number & 255 for number in header.numbers(CHARACTERS) or ())
    spaces = b"".join(_number(field, int(header.fields.get(key, True) is not False))
                      for field, key in SPACE_KEYS.items())  # fmt: skip
    return _field(2, characters) + spaces if characters else spaces


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])
