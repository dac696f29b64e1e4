"""What a machine has of a model, a text encoder, a VAE or a LoRA: its files, as two machines can compare them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ...checkpoints.digest import DIGEST_BYTES, file_digests
from ...errors import without_code
from ...recognition.component import Component
from ...recognition.defaults import defaults_for
from ...recognition.lora.scale import config_file, weights_file
from ...specs import DiffusionModelSpec, LoraSpec
from ...specs.paths import PATHS

LORA = "LoRA"


class HeldFile(Struct, frozen=True, kw_only=True):
    """A file of a machine. part: what it belongs to. name: without its folder; empty: the spec names this file. path:
    on the machine."""

    part: str
    name: str
    path: str
    size: int
    digest: str


class Listing(Struct, frozen=True, kw_only=True):
    """What a machine has of a spec. files: in the order in which they are read. distilled: how the model was distilled,
    which names of files and folders show; empty: it was not. error: why the machine cannot use the files; empty: it
    can."""

    files: tuple[HeldFile, ...] = ()
    distilled: str = ""
    error: str = ""

    @property
    def digest(self) -> bytes:
        """DIGEST_BYTES, equal for machines that have the same, wherever. Those that cannot use it are equal too: their
        ranks say why, as on one machine."""
        same = [(one.part, one.name, one.size, one.digest) for one in self.files]
        content = msgspec.msgpack.encode((bool(self.error), same, self.distilled))
        return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def unusable(error: Exception) -> Listing:
    return Listing(error=as_text(without_code(str(error))))


def files_by_part(spec: Any, found: list[Component]) -> list[tuple[str, Path]]:
    """(what a file belongs to, the file) of all files of a spec, which `found` are the networks of. Raises ValueError
    for a LoRA that is not there."""
    if isinstance(spec, LoraSpec):
        weights = weights_file(Path(spec.path))
        return [(LORA, file) for file in (weights, config_file(weights)) if file is not None]
    return [*dict.fromkeys((one.kind.what, file) for one in found for file in one.files)]


def listing(spec: Any, found: list[Component], files: list[tuple[str, Path]]) -> Listing:
    """Reads a sample of each file, if it has changed since it was read. Raises ValueError or OSError."""
    named = {getattr(spec, name) for name in PATHS[type(spec)]}
    digests = file_digests(file for _, file in files)
    held = tuple(
        HeldFile(part=part, name="" if str(file) in named else as_text(file.name), path=as_text(str(file)),
                 size=one.size, digest=one.digest)
        for (part, file), one in zip(files, digests)
    )  # fmt: skip
    return Listing(files=held, distilled=_distilled(spec, found))


def _distilled(spec: Any, found: list[Component]) -> str:
    if not isinstance(spec, DiffusionModelSpec):
        return ""
    own = defaults_for(spec, found[0], experts=len(found))
    return as_text(f"{own.distilled}, {own.steps} steps") if own.distilled else ""


def as_text(text: str) -> str:
    """A text that can be sent, as the name of a file may not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()
