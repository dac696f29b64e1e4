"""Digests of model files, from which one sees whether two hosts have the same model. Does not import torch.

A digest is a hash of a file's size, of its header, and of samples of its content, so it takes milliseconds for a file
of many gigabytes. It reads the same bytes of every format: the header of a .safetensors file, with the names, shapes
and dtypes of its tensors, is read whole; that of a torch.save file lies in the beginning, which is read whole too. Two
files that differ outside of the samples have the same digest; another format or dtype of the same weights has another.
Neither the paths of files nor the order of a model's shards matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..specs.record import FileDigest
from .states import content_state

FIRST_BYTES = 2**20  # bytes
SAMPLES, SAMPLE = 64, 64 * 2**10  # number, and bytes of each: evenly spaced, the first and the last at the ends
MAX_HEADER = 16 * 2**20  # bytes
DIGEST_BYTES = 16
THREADS = 8  # that read files at once; a disk answers many requests in the time of one


def file_digest(file: Path) -> FileDigest:
    """The digest of a file; it is not read again until it changes. Raises OSError if it cannot be read."""
    return _digest(str(file), content_state(file))


def file_digests(files: Iterable[Path]) -> list[FileDigest]:
    """The digest of each file, as `file_digest`, of several at once."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(file_digest, files))


def digests_of(files: Iterable[Path]) -> list[FileDigest]:
    """The digests of a component's files, in an order that does not depend on their names, each once."""
    return sorted({file_digest(file) for file in files}, key=lambda one: (one.size, one.digest))


def joint_digest(digests: Iterable[FileDigest]) -> str:
    """The digest of a component, from those of its files."""
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for one in digests:
        total.update(f"{one.size} {one.digest}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=4096)
def _digest(file: str, _: tuple[int, ...]) -> FileDigest:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(file, "rb", buffering=0) as opened:
        descriptor = opened.fileno()
        size = os.fstat(descriptor).st_size
        total.update(size.to_bytes(8, "little"))
        for start, end in _ranges(size, _header(os.pread(descriptor, 9, 0))):
            while start < end and (content := os.pread(descriptor, min(end - start, FIRST_BYTES), start)):
                total.update(content)
                start += len(content)
    return FileDigest(size=size, digest=total.hexdigest())


def _header(start: bytes) -> int:
    """The bytes of a .safetensors file's header and its length; 0 for other files."""
    length = int.from_bytes(start[:8], "little")
    return 8 + length if start[8:] == b"{" and length <= MAX_HEADER else 0


def _ranges(size: int, header: int) -> Iterator[tuple[int, int]]:
    """The bytes to read: (start, end), in order, without overlaps."""
    done = min(size, max(FIRST_BYTES, header))
    yield 0, done
    for number in range(SAMPLES):
        start = max(0, size - SAMPLE) * number // (SAMPLES - 1)
        if start + SAMPLE > done:
            yield max(start, done), min(start + SAMPLE, size)
            done = min(start + SAMPLE, size)
