"""What reaches the terminal. Text of servers, workflows and prompts may hold what a terminal obeys; here it is text."""

from __future__ import annotations

import sys

from tqdm import tqdm

JOINERS = "\u200c\u200d"  # of Persian words and of emoji: invisible, and harmless
LONGEST = 1000


def printable(text: str) -> str:
    """`text` with white space as spaces, and what a terminal obeys or cannot show as escapes: \\x1b, \\udc80."""
    return "".join(" " if one.isspace() else one if one.isprintable() or one in JOINERS else ascii(one)[1:-1]
                   for one in text)


def line(text: object, longest: int = LONGEST) -> str:
    """`text` as one printable line of at most `longest` characters."""
    shown = printable(" ".join(str(text)[:8 * longest].split()))
    return shown if len(shown) <= longest else f"{shown[:longest - 3]}..."


def fit(text: str, stream) -> str:
    """`text` in the characters that a stream's encoding has; the others as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream=None) -> None:
    """Prints lines, by default to stderr, above any progress bar. Nobody may listen any more: a closed terminal or pipe
    is no error."""
    stream = stream or sys.stderr
    try:
        tqdm.write(fit("\n".join(map(printable, text.split("\n"))), stream), file=stream)
    except OSError:
        return
