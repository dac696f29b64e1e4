"""A network on disk: its family and config, and where its weights lie."""

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

Rename = Callable[[str, Path], str | None]  # (a tensor's name, its shard) -> the parameter's name; None: no parameter


def _same(name: str, _: Path) -> str:
    return name


@dataclass(frozen=True)
class Component:
    """kind: which network it is. config: as diffusers or transformers write it. shards: in reading order; each is a
    file, or the folder of a distributed checkpoint.

    folder: the folder of a diffusers component; None for other layouts. tokenizer: a text encoder's tokenizer folder,
    or the file that contains the tokenizer; None: there is none. decides: other files that determine how the component
    is used, whether they exist or not. quantized: the layers that are quantized in the files; None: no layer is.
    defaults: the file with a transformer's own default settings; None: there is none.
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
        """The folder of the diffusers pipeline that it belongs to, if any."""
        return self.folder and self.folder.parent

    @property
    def config_file(self) -> Path:
        """The file that its config comes from."""
        return self.folder / "config.json" if self.folder else self.shards[0]

    @property
    def files(self) -> list[Path]:
        """All files: the weights, and those that determine their use."""
        return [file for file in files_of(self._parts) if file.is_file()]

    @property
    def fingerprint(self) -> tuple:
        """A value that changes when a file on disk changes: the weights, or a file that determines their use."""
        return states(self._parts)

    @property
    def _parts(self) -> tuple[Path, ...]:
        decides = self.decides if self.tokenizer is None else (*self.decides, self.tokenizer)
        return (*filter(Path.exists, decides), *self.shards)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in files_of(self.shards))

    def parameters(self, key: str) -> list[str]:
        """The network's names of the parameters that a tensor of the first shard holds."""
        name = self.own_name(key, self.shards[0])
        return [] if name is None else [one.name for one in targets_of(self.part.split, name, ())]

    def own_name(self, key: str, shard: Path, whole: bool = False) -> str | None:
        """The network's name of the parameter that a tensor holds; None: it is not read. whole: of all parameters,
        whether they are used or not."""
        name = self.rename(key, shard)
        if name is None or self.part.foreign(name) or not whole and self.part.unread(name, self.config):
            return None
        return name

    def places_in(self, network, whole: bool = False) -> Places:
        """Where each parameter of `network` lies. Raises ValueError if the files do not fit (see `check_weights`).
        whole: see `own_name`."""
        identify, rename = partial(_identify, self.part), partial(self.own_name, whole=whole)
        return check_weights(network, self.shards, rename, self.quantized, self.part.split, identify)


def _identify(part: Part, names: Iterable[str]) -> str:
    return part.other({name: () for name in names})
