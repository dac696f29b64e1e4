"""Decodes untrusted JSON, from servers, results files and other programs, into declared types."""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec

T = TypeVar("T")
LONGEST_PYTHON_JSON = 8 << 20  # bytes; decoding it takes up to 20 times as much memory


class NotUnderstood(ValueError):
    """The JSON is invalid, or does not match the type; the message says where."""


def decode_json(text: bytes | str, kind: type[T]) -> T:
    """Decodes `text` as a `kind`, ignoring other fields. Raises NotUnderstood."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise NotUnderstood(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _decode_python(text, kind, error)
    except RecursionError:
        raise NotUnderstood("nested too deeply") from None


def _decode_python(text: bytes | str, kind: type[T], strict: Exception) -> T:
    """Decodes Python's JSON, which ComfyUI writes: it allows NaN and lone surrogates, which become null and "?"."""
    if len(text) > LONGEST_PYTHON_JSON:
        raise NotUnderstood(str(strict)) from None
    try:
        python = json.loads(text if isinstance(text, str) else bytes(text), parse_constant=lambda _: None)
        return msgspec.json.decode(json.dumps(python, ensure_ascii=False).encode("utf-8", "replace"), type=kind)
    except RecursionError:
        raise NotUnderstood("nested too deeply") from None
    except msgspec.ValidationError as error:
        raise NotUnderstood(str(error)) from None
    except (ValueError, msgspec.DecodeError):  # invalid for Python too
        raise NotUnderstood(str(strict)) from None
