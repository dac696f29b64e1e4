"""A network on disk: of which family, how it is built, and where its weights lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..checkpoints.fused import targets_of
from ..checkpoints.msmodelslim import Description
from ..checkpoints.reader import Places, check_weights
from ..checkpoints.states import files_of, states
from ..models.family import Family, Part
from ..models.registry import family
from .kinds import Kind

Rename = Callable[[str, Path], str | None]  # a parameter's name by a tensor's, and its shard; None: it is none


def _same(name: str, _: Path) -> str:
    return name


@dataclass(frozen=True)
class Component:
    """kind: which network it is. config: as diffusers or transformers write it. shards: in the order to be read; each
    is a file, or the folder of a distributed checkpoint.

    folder: that of a diffusers component; None for any other. tokenizer: of a text encoder, its folder or the file that
    has it; None: there is none. decides: files that say how it is used, whether they exist or not. quantized: which
    layers are quantized in the files; None: none is. defaults: the file that says what a transformer is run with; None:
    there is none.
    """

    kind: Kind
    config: dict
    shards: tuple[Path, ...]
    folder: Path | None
    rename: Rename = _same
    tokenizer: Path | None = None
    decides: tuple[Path, ...] = ()
    quantized: Description | None = None
    defaults: Path | None = None

    @property
    def family(self) -> Family:
        return family(self.kind.family)

    @property
    def part(self) -> Part:
        return self.kind.part

    @property
    def root(self) -> Path | None:
        """The diffusers pipeline that it belongs to; None where it belongs to none."""
        return self.folder and self.folder.parent

    @property
    def config_file(self) -> Path:
        """The file that its config was read from."""
        return self.folder / "config.json" if self.folder else self.shards[0]

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file on disk does: the weights, and what says how to use them."""
        decides = self.decides if self.tokenizer is None else (*self.decides, self.tokenizer)
        return states((*filter(Path.exists, decides), *self.shards))

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in files_of(self.shards))

    def parameters(self, key: str) -> list[str]:
        """The network's names of the parameters that a tensor of its first shard holds."""
        return [one.name for one in targets_of(self.part.split, self.rename(key, self.shards[0]), ())]

    def places_in(self, network) -> Places:
        """Where each parameter of `network` lies. Raises ValueError where they do not fit (see `check_weights`)."""
        identify = partial(_identify, self.part)
        return check_weights(network, self.shards, self.rename, self.quantized, self.part.split, identify)


def _identify(part: Part, names: Iterable[str]) -> str:
    return part.other({name: () for name in names})
