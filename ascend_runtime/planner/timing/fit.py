"""Fits the cost of each unit to the seconds that jobs took, by weighted non-negative least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TURNS = 2000  # of the fit; coordinates that hardly change end it earlier
SETTLED = 1e-9
REWEIGHTED, LARGE = 5, 0.1  # turns; a relative error beyond which a job counts less (Huber's weights)


@dataclass(frozen=True)
class TimedJob:
    """A job, or a stage of one: what it took, by unit, and its seconds. name: in a few words."""

    name: str
    amounts: Mapping[str, float]
    seconds: float


def fitted_costs(samples: Sequence[TimedJob], least: Mapping[str, float] | None = None) -> dict[str, float]:
    """Seconds for each unit that occurs in the samples: those with the least sum of squared relative errors, none of
    them negative; errors beyond LARGE count by their size only, so that a disturbed job does not bend all others.
    least: what a unit costs at least, such as a FLOP at a device's peak. Raises ValueError without samples."""
    if not samples:
        raise ValueError("there is nothing to fit: no job was measured")
    units = sorted({unit for sample in samples for unit, amount in sample.amounts.items() if amount})
    relative = np.array([[sample.amounts.get(unit, 0.0) / sample.seconds for unit in units] for sample in samples])
    weights, bounds = np.ones(len(samples)), np.array([(least or {}).get(unit, 0.0) for unit in units])
    above = 1 - relative @ bounds
    for _ in range(REWEIGHTED):
        costs = bounds + nonnegative(relative * weights[:, None], above * weights)
        weights = np.sqrt(LARGE / np.maximum(np.abs(relative @ costs - 1), LARGE))
    return dict(zip(units, map(float, costs)))


def nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |matrix x - target|^2, by coordinate descent: a convex problem, whose coordinates are
    minimised in turns (Franc, Hlavac and Navara, "Sequential coordinate-wise algorithm for the non-negative least
    squares problem", 2005). matrix [samples, units]: no column is zero."""
    scale = np.linalg.norm(matrix, axis=0)
    scaled = matrix / scale
    gram, x = scaled.T @ scaled, np.zeros(matrix.shape[1])
    slope = -scaled.T @ target  # of half the squared error, at x
    for _ in range(TURNS):
        largest = 0.0
        for unit in range(len(x)):
            moved = max(0.0, x[unit] - slope[unit] / gram[unit, unit]) - x[unit]
            x[unit] += moved
            slope += moved * gram[unit]
            largest = max(largest, abs(moved))
        if largest < SETTLED:
            break
    return x / scale


def errors(samples: Iterable[TimedJob], costs: Mapping[str, float]) -> dict[str, float]:
    """By sample's name, how much longer it is predicted to take than it took, relative to that."""
    return {sample.name: predicted_by(sample, costs) / sample.seconds - 1 for sample in samples}


def predicted_by(sample: TimedJob, costs: Mapping[str, float]) -> float:
    return sum(amount * costs.get(unit, 0.0) for unit, amount in sample.amounts.items())
