"""Compares files between machines: the first rank of each reads samples of them, and all ranks learn the answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from ...checkpoints.digest import DIGEST_BYTES
from ...checkpoints.states import states
from ...errors import coded_error
from ...parallel.machines import Machines, machines
from ...parallel.mesh import gather_bytes
from ...recognition.component import Component
from ...specs import DiffusionModelSpec, LoraSpec
from ...specs.paths import without_paths
from ..job import Job
from .differences import difference
from .listing import Listing, files_by_part, listing, unusable

MOST_NAMED = 8  # diffusion models


class SameFiles:
    """Requires that machines have the same files. On one machine it does nothing, and reads nothing.

    find: the networks on disk that a spec describes.
    """

    def __init__(self, find: Callable[[Any], list[Component]]):
        self._find = find
        self._states: tuple = ()  # of the files that this rank has compared last
        self._digests: dict[DiffusionModelSpec, bytes] = {}  # by the spec without LoRAs

    def require(self, job: Job, specs: Iterable[Any]) -> None:
        """Raises ValueError, on all ranks alike, if the files of these specs differ between machines, before anything
        of them is loaded. All ranks must call it. Takes milliseconds if no file has changed since it was compared.

        A file that no machine can use is left to loading, which says what is wrong with it.
        """
        known = machines()
        if known.count == 1:
            return
        compared = [one for spec in specs for one in (spec, *getattr(spec, "loras", ()))]
        with job.stage("load"), job.together():
            self._states = ()
            own = [self._listed(job, one) for one in compared] if known.is_first else []
        joint = gather_bytes(b"".join(one.digest for one in own))
        digests = [joint[rank] for rank in known.firsts]
        if len(set(digests)) > 1:
            raise coded_error("AV-1907", _first_difference(known, gather_bytes(msgspec.msgpack.encode(own))))
        self._name(compared, digests[0])

    def require_unchanged(self) -> None:
        """Raises ValueError if a file has changed since `require` compared it: what was loaded may be another than on
        other machines."""
        for file, state in self._states:
            if state != _state(file):
                raise coded_error("AV-1315", f"{file} changed while it was read. Run the job again.")

    def identity(self, spec: DiffusionModelSpec) -> Hashable:
        """What all machines call the weights of a model that was compared, where paths differ between machines.
        spec: without LoRAs."""
        return spec if machines().count == 1 else (without_paths(spec), self._digests.get(spec))

    def _listed(self, job: Job, spec: Any) -> Listing:
        job.check()
        try:
            found = [] if isinstance(spec, LoraSpec) else self._find(spec)
            files = files_by_part(spec, found)
            self._states += tuple((file, _state(file)) for _, file in files)
            return listing(spec, found, files)
        except (OSError, ValueError) as error:
            return unusable(error)

    def _name(self, compared: list[Any], digests: bytes) -> None:
        for number, spec in enumerate(compared):
            if isinstance(spec, DiffusionModelSpec):
                key = replace(spec, loras=())
                self._digests.pop(key, None)
                self._digests[key] = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        while len(self._digests) > MOST_NAMED:
            del self._digests[next(iter(self._digests))]


def _state(file: Path) -> tuple:
    return states((file,))


def _first_difference(known: Machines, gathered: list[bytes]) -> str:
    """What differs of the first spec of which anything does. gathered: the listings of each rank."""
    listings = {known.name_of(rank): msgspec.msgpack.decode(gathered[rank], type=list[Listing])
                for rank in known.firsts}  # fmt: skip
    of_specs = (dict(zip(listings, one)) for one in zip(*listings.values()))
    return difference(next(one for one in of_specs if len({held.digest for held in one.values()}) > 1))
