"""How fast a machine computes, sends and reads: published figures of cards, and those that were measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """source: where the figures come from."""

    source: str


def of_card(card: str) -> Rates:
    """Published figures of a card. Raises ValueError for an unknown one."""
    raise NotImplementedError
