"""The allocation against an exhaustive search, and its budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.compression.allocation import Curve, allocate


def curve(losses: list[float], cost: int, first: int = 1) -> Curve:
    ranks = np.arange(first, first + len(losses))
    return Curve(ranks, ranks * cost, np.array(losses))


def total(curves: list[Curve], chosen: list[int]) -> tuple[float, float]:
    places = [int(np.flatnonzero(c.ranks == rank)[0]) for c, rank in zip(curves, chosen, strict=True)]
    return (
        sum(float(c.costs[p]) for c, p in zip(curves, places, strict=True)),
        sum(float(c.losses[p]) for c, p in zip(curves, places, strict=True)),
    )


def test_the_matrix_that_matters_gets_the_parameters() -> None:
    curves = [curve([9.0, 4.0, 1.0, 0.0], cost=1), curve([0.09, 0.04, 0.01, 0.0], cost=1)]
    assert allocate(curves, budget=5.0) == [4, 1]


def test_dense_is_chosen_where_the_last_step_is_a_bargain() -> None:
    bargain = Curve(np.array([1, 2, 3]), np.array([10.0, 20.0, 21.0]), np.array([5.0, 4.9, 0.0]))
    assert allocate([bargain], budget=21.0) == [3]
    assert allocate([bargain], budget=20.0) == [2]


def test_floors_alone_may_exceed_the_budget() -> None:
    assert allocate([curve([1.0, 0.0], cost=10, first=3)], budget=5.0) == [3]


convex = st.lists(st.floats(0.01, 10), min_size=2, max_size=5).map(
    lambda steps: [sum(sorted(steps)[: len(steps) - i]) for i in range(len(steps) + 1)]
)


@given(st.lists(convex, min_size=1, max_size=3), st.integers(1, 4), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_equals_exhaustive_search_on_convex_curves_of_equal_cost(
    losses: list[list[float]], cost: int, share: float
) -> None:
    curves = [curve(values, cost) for values in losses]
    lowest, highest = (sum(float(c.costs[i]) for c in curves) for i in (0, -1))
    budget = lowest + share * (highest - lowest)
    spent, lost = total(curves, allocate(curves, budget))
    options = itertools.product(*(c.ranks.tolist() for c in curves))
    found = [total(curves, list(option)) for option in options]
    # a budget that is a hair below a whole number may be rounded to it
    best, other = (min(loss for cost_, loss in found if cost_ <= budget + hair) for hair in (0, 1e-9))
    assert spent <= budget + 1e-9
    assert lost in (pytest.approx(best, abs=1e-9), pytest.approx(other, abs=1e-9))
