"""What a check of the host finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...hardware.host import HostFault

OK, WARNING, ERROR = FINDING_LEVELS = ("OK", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """check: what was checked, a name that stays the same. level: of FINDING_LEVELS. code, cure: None if all is
    well."""

    check: str
    level: str
    found: str
    code: str | None = None
    cure: str | None = None


def fine(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def warning(check: str, fault: HostFault) -> Finding:
    """Jobs run, but slowly, or not all of them."""
    return Finding(check, WARNING, fault.found, fault.code, fault.cure)


def error(check: str, fault: HostFault) -> Finding:
    """Jobs fail, or some of them."""
    return Finding(check, ERROR, fault.found, fault.code, fault.cure)


def errors_or(check: str, faults: Iterable[HostFault], found: str) -> Iterator[Finding]:
    """An error for each fault, or that all is well."""
    faults = list(faults)
    yield from (error(check, fault) for fault in faults)
    if not faults:
        yield fine(check, found)


def worst(findings: Iterable[Finding]) -> str:
    return max((finding.level for finding in findings), key=FINDING_LEVELS.index, default=OK)
