"""What all tokenizer files have: bounds, the class that their settings name, and the steps of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import coded_error
from ..bounded import read_json
from ..faults import shown

JSON = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "config.json")  # may name a class
# transformers' classes for UMT5's files, in all its versions.
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast", "PreTrainedTokenizerFast",
                 "TokenizersBackend")  # fmt: skip
TOKENIZER_ADVICE = "Use the tokenizer of Wan-AI/Wan2.1-T2V-1.3B, google/umt5-xxl, instead."
MAX_TOKENIZER_JSON_BYTES = 32 * 2**20  # google/umt5-xxl's has 17 MB
MAX_PIECES = 400_000  # google/umt5-xxl has 256,300
MAX_PIECE_LENGTH = 256  # characters
MAX_VOCABULARY_LENGTH = 8 * 2**20  # characters of all pieces; each may take a node of a trie
MAX_ADDED_TOKENS = 1000  # google/umt5-xxl has 300
MAX_TOKENIZER_STEPS = 16  # in a part, including Sequences
MAX_TEMPLATE_TOKENS = 8
SEQUENCES = {  # of each part of the file: the key of a Sequence's steps
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip


def check_class(folder: Path, classes: tuple[str, ...] | None = T5_TOKENIZERS, advice: str = TOKENIZER_ADVICE) -> None:
    """Raises ValueError for a tokenizer whose settings name code in the folder, or another class than these of UMT5's.

    classes: None: any, as the content decides. advice: which tokenizer to use instead.
    """
    for file in (folder / name for name in SETTINGS):
        settings = read_json(file) if file.is_file() else {}
        if settings.get("auto_map"):
            raise coded_error("AV-1312", f"{file} names code in its folder (auto_map), which is never run. {advice}")
        named = settings.get("tokenizer_class")
        if classes is not None and named is not None and named not in classes:
            raise coded_error("AV-1410", f"{file} names the class {shown(repr(named))}, which is not UMT5's. {advice}")


def check_added(tokens: Any) -> None:
    """Raises ValueError for added tokens that are not texts, are too long or too many."""
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED_TOKENS:
        raise ValueError(f"its added_tokens must be a list of at most {MAX_ADDED_TOKENS}")
    words = [token.get("content") if isinstance(token, dict) else None for token in tokens]
    if not all(isinstance(word, str) and 0 < len(word) <= MAX_PIECE_LENGTH for word in words):
        raise ValueError(f"one of its added_tokens is not a text of at most {MAX_PIECE_LENGTH} characters")


def steps_in(part: str, given: Any, allowed: tuple[str, ...], whose: str) -> Iterator[dict]:
    """The steps of a part, with Sequences flattened. Raises ValueError for other types than the allowed ones, or too
    many steps. whose: the tokenizers that have the allowed ones."""
    left, count = [] if given is None else [given], 0
    while left:
        step, count = left.pop(), count + 1
        named = step.get("type") if isinstance(step, dict) else None
        inner = step.get(SEQUENCES[part]) if named == "Sequence" else None
        if count > MAX_TOKENIZER_STEPS:
            raise ValueError(f"its {part} has more than {MAX_TOKENIZER_STEPS} steps")
        if isinstance(inner, list):
            left += inner[: MAX_TOKENIZER_STEPS + 1]
        elif named in allowed:
            yield step
        else:
            raise ValueError(f"its {part} has the step {shown(repr(named))}, which no {whose} tokenizer has")


def check_template(step: dict) -> None:
    """Checks the tokens that a template adds to each prompt."""
    tokens = step.get("special_tokens")
    tokens = list(tokens.values()) if isinstance(tokens, dict) else [None]
    pieces = [step.get("single"), step.get("pair"), tokens]
    pieces += [token.get(key) if isinstance(token, dict) else None for token in tokens for key in ("ids", "tokens")]
    if not all(isinstance(one, list) and len(one) <= MAX_TEMPLATE_TOKENS for one in pieces):
        raise ValueError(f"its template must have lists of at most {MAX_TEMPLATE_TOKENS} tokens")
