"""Reads the files of a text encoder's tokenizer, and checks their content.

A tokenizer's folder may contain its own Python class, which transformers would run after asking. Only tokenizer.json,
the vocabulary and merges of a BPE, or the sentencepiece model are read here, and libraries build the tokenizer from
them without running code of the folder.
"""

from .bpe import bpe_json, clip_json
from .steps import JSON, TOKENIZER_ADVICE, check_class
from .unigram import MAX_SPIECE_BYTES, SPIECE, check_spiece, tokenizer_json, tokenizer_model

__all__ = [
    "JSON",
    "MAX_SPIECE_BYTES",
    "SPIECE",
    "TOKENIZER_ADVICE",
    "bpe_json",
    "check_class",
    "check_spiece",
    "clip_json",
    "tokenizer_json",
    "tokenizer_model",
]
