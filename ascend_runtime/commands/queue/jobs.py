"""The jobs to run: every prompt with every seed, generated one at a time to limit memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import QueueError, workflow
from .input_files import read_text
from .screen import one_line
from .seeds import Seeds
from .server import upload_name

LARGEST_LIST = 16 << 20  # bytes of a file with prompts or images
LONGEST_PROMPT = 1 << 20  # bytes
Pair = tuple[str, Path | None]  # a prompt, and an image for it


@dataclass(frozen=True)
class QueueJob:
    """One run of the workflow. key: a hash of its graph, to recognise it in later runs."""

    prompt: str
    seed: int | None
    image: Path | None
    graph: dict
    key: str


class Jobs:
    """The jobs of a workflow: every pair with every seed, or with the workflow's own seed if `seeds` is None. Duplicate
    pairs and seeds count once. Raises QueueError if the workflow has no input for a prompt, or for a seed, image or
    negative prompt that is given."""

    def __init__(self, graph: dict, pairs: list[Pair], seeds: Seeds | None, negative: str | None):
        self._graph, self._pairs, self._seeds = graph, list(dict.fromkeys(pairs)), seeds
        self._prompt = workflow.require(graph, workflow.PROMPT)
        self._negative = [] if negative is None else workflow.require_negative(graph)
        self._image = workflow.require_image(graph) if any(image for _, image in pairs) else []
        self._seed = (workflow.require if seeds else workflow.find)(graph, workflow.SEED)
        self._negative_text = negative
        self.count = len(self._pairs) * (seeds.count if seeds else 1)

    def __str__(self) -> str:
        seeds = f", {self._seeds.count:,} seed{'s' * (self._seeds.count != 1)} each" if self._seeds else ""
        return f"{self.count:,} job{'s' * (self.count != 1)}: {len(self._pairs):,} " \
               f"prompt{'s' * (len(self._pairs) != 1)}{seeds}"

    def __iter__(self) -> Iterator[QueueJob]:
        for prompt, image in self._pairs:
            name = image and upload_name(image)
            for seed in self._seeds or [workflow.get(self._graph, self._seed)]:
                edited = workflow.edited(self._graph, [(self._prompt, prompt), (self._negative, self._negative_text),
                                                       (self._seed, seed), (self._image, name)])
                yield QueueJob(prompt, seed, image, edited, workflow.digest(edited))


def read_pairs(prompts: Path, images: Path | None) -> list[Pair]:
    """(prompt, image) pairs: the n-th prompt with the n-th image, or one image for all prompts."""
    texts = _read_lines(prompts, "--prompts")
    if long := next((text for text in texts if len(text.encode()) > LONGEST_PROMPT), None):
        raise QueueError(f"--prompts {prompts} has a line of more than {LONGEST_PROMPT >> 20} MiB: "
                         f"'{one_line(long, 80)}'. A prompt is one line; shorten it.")
    if images is None:
        return [(text, None) for text in texts]
    paths = [images.parent / name for name in _read_lines(images, "--images")]
    if len(paths) not in (1, len(texts)):
        raise QueueError(f"--images {images} has {len(paths)} lines for {len(texts)} prompts. "
                         "Give one image per prompt, or one for all.")
    if missing := [str(path) for path in paths if not _is_file(path)]:
        raise QueueError(f"--images {images} names files that do not exist: {one_line(', '.join(missing))}. "
                         "Paths are relative to the folder of that file.")
    return list(zip(texts, paths if len(paths) > 1 else paths * len(texts)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a NUL
        return False


def _read_lines(path: Path, option: str) -> list[str]:
    lines = [text.strip() for text in read_text(path, f"{option} {path}", LARGEST_LIST).split("\n")]
    if not (kept := [text for text in lines if text and not text.startswith("#")]):
        raise QueueError(f"{option} {path} has no entries. Write one per line; lines that start with # are skipped.")
    return kept
