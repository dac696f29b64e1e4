"""What it costs to send between machines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MachineLink:
    """Costs in seconds. rank_byte: of a byte, while one rank of a machine sends. machine_byte: while all its ranks
    do. exchange: until the first byte arrives. source: where these come from, "measured" or "given"."""

    rank_byte: float
    machine_byte: float
    exchange: float
    source: str = "measured"

    @property
    def gigabits(self) -> float:
        """Gbit/s that a machine sends."""
        return 8e-9 / self.machine_byte

    def seconds(self, of_rank: float, of_machine: float, exchanges: float = 0.0) -> float:
        """of_rank, of_machine: the bytes that one rank, and all ranks of a machine together, send to other machines."""
        return max(of_rank * self.rank_byte, of_machine * self.machine_byte) + exchanges * self.exchange

    def __str__(self) -> str:
        rate = f"{self.gigabits:.0f}" if self.gigabits >= 10 else f"{self.gigabits:.2g}"
        return f"the {self.source} {rate} Gbit/s"
