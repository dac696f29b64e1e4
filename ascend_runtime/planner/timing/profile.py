"""What was measured on this host, in a JSON file next to the models: `ascend_video_profile.json`.

It holds no name of a host and no path. It is read as any file that somebody may have changed.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import Struct

from ...checkpoints.bounded import MAX_NAME_LENGTH, read_bounded
from ...checkpoints.faults import shown
from ...errors import coded_error
from ...hardware.versions import versions
from ..rates import UNITS, Rates, of_card

PROFILE = "ascend_video_profile.json"
FORM = 1  # of the file
MAX_PROFILE_BYTES = 2**20  # an entry takes about 1 kB
MOST_ENTRIES = 256
HIGHEST = 3600.0  # seconds that no unit takes
VERSIONED = ("torch", "torch_npu", "mindiesd")


class ProfileEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs that were fitted on devices of a kind and card, shared by a number of ranks.

    kind: "npu", "cuda" or "cpu". card: its product line. family: of the measured networks. versions: of packages.
    costs: seconds for each of rates.UNITS. jobs: the number of measured jobs. error: their median relative error in the
    fit.
    """

    kind: str
    card: str
    family: str
    ranks: int
    versions: dict[str, str]
    costs: dict[str, float]
    jobs: int
    error: float

    def __post_init__(self):
        names = (self.kind, self.card, self.family, *self.versions, *self.versions.values())
        if not all(name.isprintable() and len(name) <= MAX_NAME_LENGTH for name in names):
            raise ValueError("it has a name that is not printable")
        unknown = sorted(set(self.costs) - set(UNITS))
        if unknown:
            raise ValueError(f"it has costs of '{shown(unknown[0])}'")
        if not all(math.isfinite(cost) and 0 <= cost <= HIGHEST for cost in (*self.costs.values(), self.error)):
            raise ValueError("it has a cost that is no number of seconds")

    @property
    def about(self) -> tuple:
        """What no two entries of a profile have in common."""
        return self.kind, self.card, self.family, self.ranks


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    form: int = FORM
    entries: tuple[ProfileEntry, ...] = ()

    def __post_init__(self):
        if self.form != FORM:
            raise ValueError(f"it has the form {self.form}; this version reads {FORM}")
        if len(self.entries) > MOST_ENTRIES:
            raise ValueError(f"it has {len(self.entries)} entries, more than {MOST_ENTRIES}")

    def with_entries(self, entries: list[ProfileEntry]) -> Profile:
        """With these in place of those about the same."""
        kept = {entry.about: entry for entry in (*self.entries, *entries)}
        return Profile(entries=tuple(kept.values())[-MOST_ENTRIES:])

    def rates(self, kind: str, card: str, family: str) -> Rates | None:
        """What was measured on such devices with the installed versions; None: nothing."""
        found = [one for one in self.entries
                 if (one.kind, one.card, one.family, one.versions) == (kind, card, family, timed_with())]  # fmt: skip
        if not found:
            return None
        assumed = of_card(card).costs
        jobs = sum(one.jobs for one in found)
        return Rates(
            source=f"measured on this host with {jobs} jobs",
            costs={**assumed, **found[0].costs},
            measured={one.ranks: {**assumed, **one.costs} for one in found},
        )


def profile_file(path: str) -> Path:
    """The path of the profile for the model at `path`: in its folder, or next to its file."""
    return Path(path) / PROFILE if Path(path).is_dir() else Path(path).parent / PROFILE


def read_profile(file: Path) -> Profile:
    """Empty if there is no such file. Raises ValueError for an invalid one."""
    if not os.path.lexists(file):
        return Profile()
    try:
        return msgspec.json.decode(read_bounded(file, MAX_PROFILE_BYTES), type=Profile)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise coded_error(
            "AV-1309", f"{file} is not a profile of a host ({shown(error)}). Remove it, or measure again: "
            "python -m ascend_runtime plan MODEL --measure"
        ) from None  # fmt: skip


def check_writable(file: Path) -> None:
    """Raises ValueError if the profile could not be written."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise coded_error(
            "AV-1314", f"{file} cannot be written ({error.strerror}), so that a measurement would be lost. Change the "
            "permissions of its folder, or measure with a copy of the model elsewhere."
        ) from None  # fmt: skip


def write_profile(file: Path, profile: Profile) -> None:
    """Replaces the file atomically: who reads it meanwhile sees the old profile or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    os.replace(partial, file)


def rates_for(path: str, kind: str, card: str, family: str, ranks: int | None = None) -> Rates:
    """What was measured on this host next to the model at `path`, else the published figures of the card; their source
    says why. ranks: the number for which rates are needed; None: all that were measured. Raises ValueError for an
    invalid profile or an unknown card."""
    found, published = read_profile(profile_file(path)).rates(kind, card, family), of_card(card)
    if found is None or ranks in (None, *found.measured):
        return found or published
    numbers = ", ".join(map(str, sorted(found.measured)))
    return replace(published, source=f"{published.source}; this host was measured with {numbers} ranks, not {ranks}")


def timed_with() -> dict[str, str]:
    """The versions of the installed packages on which times depend."""
    return {name: version for name, version in versions().items() if name in VERSIONED}
