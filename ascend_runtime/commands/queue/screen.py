"""Prints to the terminal, with control characters in texts of servers, workflows and prompts escaped."""

from __future__ import annotations

import sys

from tqdm import tqdm

JOINERS = "\u200c\u200d"  # in Persian words and emoji; not printable, but harmless
MAX_LINE = 1000


def escaped(text: str) -> str:
    """`text` with white space as spaces, and other characters that are not printable as escapes: \\x1b, \\udc80."""
    return "".join(" " if one.isspace() else one if one.isprintable() or one in JOINERS else ascii(one)[1:-1]
                   for one in text)


def one_line(text: object, longest: int = MAX_LINE) -> str:
    """`text` as one printable line of at most `longest` characters."""
    shown = escaped(" ".join(str(text)[:8 * longest].split()))
    return shown if len(shown) <= longest else f"{shown[:longest - 3]}..."


def fit(text: str, stream) -> str:
    """`text` with characters that the stream's encoding does not support as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream=None) -> None:
    """Prints lines, by default to stderr, above any progress bar. A closed terminal or pipe is not an error."""
    stream = stream or sys.stderr
    try:
        tqdm.write(fit("\n".join(map(escaped, text.split("\n"))), stream), file=stream)
    except OSError:
        return
