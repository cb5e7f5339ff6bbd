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
    energy: float = 1.0  # the loss at rank 0


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


def tiered_thresholds(threshold: float, depth: int) -> list[float]:
    """The paper's tiers: energy that a matrix of each layer keeps. The first and the last quarter of the layers lose a
    third of what the middle ones, which keep `threshold`, lose.

    The paper (section IV-B) says that early and late layers keep more and gives no numbers; the third is ours.
    """
    quarter = round(depth / 4)
    outer = 1 - (1 - threshold) / 3
    return [threshold if quarter <= layer < depth - quarter else outer for layer in range(depth)]


def allocate_energy(curves: list[Curve], depths: list[int], budget: float) -> list[int]:
    """Ranks that keep the tiers' share of each curve's energy, for the highest threshold that meets the budget.

    `depths[i]` is the layer of curve i. The threshold is found by bisection, to 1e-9.
    """
    depth = max(depths) + 1

    def ranks(threshold: float) -> list[int]:
        kept = tiered_thresholds(threshold, depth)
        return [_first_within(curve, 1 - kept[layer]) for curve, layer in zip(curves, depths, strict=True)]

    def cost(places: list[int]) -> float:
        return float(sum(curve.costs[place] for curve, place in zip(curves, places, strict=True)))

    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranks(middle)) <= budget else (low, middle)
    return [int(curve.ranks[place]) for curve, place in zip(curves, ranks(low), strict=True)]


def _first_within(curve: Curve, share: float) -> int:
    """The first place whose loss is at most `share` of the whole energy."""
    return int(np.flatnonzero(curve.losses <= share * curve.energy)[0])
