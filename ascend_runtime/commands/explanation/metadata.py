"""Reads what ComfyUI has written into a video or a picture. Anyone may have written the file: only its header is read,
within bounds, and what it says is checked against declared types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from ...checkpoints.faults import as_value_error, shown
from ...specs.record import RECORD_FORMAT, KEY, VideoRecord
from ..queue.typed import NotUnderstood, decode_json

MAX_CHARACTERS = 16 << 20  # of an entry; a workflow has some 100 kB
MAX_MOOV = 256 << 20  # bytes of an MP4 file's index, which FFmpeg reads whole; an hour of video takes 10 MB
MAX_BOXES = 10_000
PNG, RIFF, WEBP, EBML = b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP", b"\x1a\x45\xdf\xa3"
GRAPH = "prompt"  # ComfyUI's entry with the graph in API format


class NoMetadata(ValueError):
    """The file has no record of what the ranks did."""


class Node(Struct):
    """A node of a graph in API format."""

    class_type: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Metadata:
    """record: of the ranks' jobs. graph: ComfyUI's, in API format; empty if the file has none."""

    record: VideoRecord
    graph: dict[str, dict]


def read(file: Path) -> Metadata:
    """Raises NoMetadata, and ValueError for files that cannot be read, or whose record is invalid."""
    entries = {key.lower(): value for key, value in _entries(file)}  # Matroska writes keys in capitals
    if KEY not in entries:
        raise NoMetadata(f"{file} has no metadata of Ascend Video: its nodes did not make it, or they were removed.")
    record = _decoded(file, KEY, entries[KEY], Mark)
    if record.format != RECORD_FORMAT:
        raise ValueError(f"{file} has metadata of format {record.format}; this version reads format {RECORD_FORMAT}. "
                         "Update the pack.")  # fmt: skip
    record = _decoded(file, KEY, entries[KEY], VideoRecord)
    if not record.jobs:
        raise NoMetadata(f"{file} was saved by a graph with nodes of Ascend Video, but none of them made it.")
    nodes = _decoded(file, GRAPH, entries[GRAPH], dict[str, Node]) if GRAPH in entries else {}
    graph = {name: {"class_type": node.class_type, "inputs": node.inputs} for name, node in nodes.items()}
    return Metadata(record, graph)


class Mark(Struct):
    """What records of all formats have."""

    format: int


def _decoded(file: Path, key: str, text: str, kind: Any) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{file} has an entry {key} of {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.")
    try:
        return decode_json(text, kind)
    except NotUnderstood as error:
        raise ValueError(f"{file} has an entry {key} that is not valid ({shown(error)}).") from None


def _entries(file: Path) -> Iterator[tuple[str, str]]:
    """The entries of a file's metadata, by its content, whatever its name."""
    with file.open("rb") as opened:
        start = opened.read(16)
        if start.startswith(PNG) or start.startswith(RIFF) and start[8:12] == WEBP:
            yield from _of_picture(file, opened)
        elif start[4:8] == b"ftyp":
            _check_boxes(file, opened)
            yield from _of_video(file, "mp4")
        elif start.startswith(EBML):
            yield from _of_video(file, "matroska")
        else:
            raise ValueError(f"{file} is none of these: MP4, WebM, PNG, WebP. Give a file that ComfyUI has saved.")


def _of_picture(file: Path, opened: BinaryIO) -> Iterator[tuple[str, str]]:
    """PNG's texts before the picture, and WebP's EXIF entries, which core writes as "key:JSON". Decodes no picture."""
    from PIL import Image

    with as_value_error(file, "its metadata"):
        opened.seek(0)
        with Image.open(opened, formats=("PNG", "WEBP")) as picture:
            texts = {key: value for key, value in picture.info.items() if isinstance(value, str)}
            exif = [value for value in picture.getexif().values() if isinstance(value, str)]
    yield from texts.items()
    yield from ((key, value) for key, colon, value in (text.partition(":") for text in exif) if colon)


def _of_video(file: Path, container: str) -> Iterator[tuple[str, str]]:
    """container: the only format that FFmpeg may take the file for, as others open further files."""
    try:
        import av
    except ImportError:
        raise ValueError("explain needs av to read videos, which this Python lacks. Run: pip install av") from None
    with as_value_error(file, "its metadata"):
        with av.open(str(file), format=container, metadata_errors="replace") as video:
            texts = dict(video.metadata)
    yield from texts.items()


def _check_boxes(file: Path, opened: BinaryIO) -> None:
    """Raises ValueError for an MP4 file whose index is too large."""
    at, size = 0, opened.seek(0, 2)
    for _ in range(MAX_BOXES):
        opened.seek(at)
        head = opened.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big") or size - at
        if head[4:8] == b"moov" and length > MAX_MOOV:
            raise ValueError(f"{file} has an index of {length:,} bytes; at most {MAX_MOOV:,} are read.")
        at += length
        if at >= size or length < 8:
            return
    raise ValueError(f"{file} has more than {MAX_BOXES:,} boxes. Is it a video?")
