"""One parameter budget over all matrices: where does a parameter save the most loss?

Each matrix has a curve: what it costs in parameters, and what its truncation is predicted to cost in loss, for every
rank up to full, where it stays dense. On the lower convex hull of that curve every step buys less than the one
before, so taking all matrices' steps in the order of loss saved a parameter is the exact optimum of the sum up to the
last step, with the slope there as the Lagrange multiplier.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Entry i is rank `ranks[i]`: ascending, the last one dense. `losses` in one unit for all matrices."""

    ranks: np.ndarray
    costs: np.ndarray  # parameters
    losses: np.ndarray


def allocate(curves: list[Curve], budget: float) -> list[int]:
    """A rank for each curve with a total cost of at most `budget`, as small a total loss as the hulls allow.

    The first rank of each curve is its floor; if the floors alone exceed the budget they are returned as they are.
    """
    hulls = [_lower_hull(curve) for curve in curves]
    position = [hull[0] for hull in hulls]
    spent = float(sum(curve.costs[0] for curve in curves))
    if spent > budget:
        return [int(curve.ranks[0]) for curve in curves]
    steps = [
        (-_slope(curve, start, end), number, start, end)
        for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for start, end in itertools.pairwise(hull)
    ]
    for _, number, start, end in sorted(steps):
        curve = curves[number]
        if position[number] != start:
            continue  # a cheaper step of this matrix did not fit, so this one cannot follow it
        affordable = curve.costs[start : end + 1] <= curve.costs[start] + budget - spent
        reached = start + int(np.flatnonzero(affordable)[-1])
        spent += float(curve.costs[reached] - curve.costs[start])
        position[number] = reached
    return [int(curve.ranks[place]) for curve, place in zip(curves, position, strict=True)]


def _slope(curve: Curve, start: int, end: int) -> float:
    """Loss saved for each parameter between two points of a curve."""
    return float((curve.losses[start] - curve.losses[end]) / (curve.costs[end] - curve.costs[start]))


def _lower_hull(curve: Curve) -> list[int]:
    """Indices of the points on the lower convex hull, by cost (Andrew's monotone chain)."""
    hull: list[int] = []
    for point in range(len(curve.ranks)):
        while len(hull) >= 2 and _slope(curve, hull[-2], hull[-1]) <= _slope(curve, hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull
