"""Comparisons over seeds and windows, and the recovery curve."""

import math

import numpy as np
import pytest

from sparsekd.evaluate import Perplexity
from sparsekd.reproduce.patterns import Pattern, dense, distilled, verdict
from sparsekd.reproduce.spread import Comparison, compare, fit_recovery, student

TOKENS = [100] * 40


def windows(nll: list[float], tokens: list[int]) -> Perplexity:
    value, total = math.exp(sum(nll) / sum(tokens)), sum(tokens)
    return Perplexity(value, None, 1.0, total, value, None, total, 64, 32, nll, tokens)


def measured(per_token: float, noise: float = 0.0, seed: int = 0) -> Perplexity:
    drawn = np.random.default_rng(seed).normal(per_token, noise, len(TOKENS))
    return windows((drawn * 100).tolist(), TOKENS)


def test_mean_and_deviation_are_over_seeds() -> None:
    found = compare([measured(3.1), measured(3.3), measured(3.2)], [measured(3.0)] * 3)
    assert found.value == pytest.approx(0.2) and found.ratio == pytest.approx(math.exp(0.2))
    assert found.deviation == pytest.approx(0.1)
    half = 4.303 * 0.1 / math.sqrt(3)  # Student's t, 2 degrees of freedom; all windows agree
    assert found.half == pytest.approx(half)
    assert found.interval == pytest.approx((math.exp(0.2 - half), math.exp(0.2 + half)))


def test_one_seed_leaves_the_text_s_error_only() -> None:
    found = compare([measured(3.1, 0.5)], [measured(3.0)])
    assert found.deviation is None
    assert found.half == pytest.approx(2.02 * 0.5 / math.sqrt(40), rel=0.3)


def test_few_windows_make_a_wider_interval() -> None:
    """Two windows whose differences are 0.1 and 0.3 nats: a standard error of 0.1 with one degree of freedom."""
    low, high = windows([300.0, 300.0], [100, 100]), windows([310.0, 330.0], [100, 100])
    assert compare([high], [low]).half == pytest.approx(12.706 * 0.1, rel=1e-4)
    harder = windows([330.0, 350.0], [100, 100])  # another seed: 0.2 nats more
    both = math.hypot(12.706 * 0.1, 12.706 * 0.2 / math.sqrt(2) / math.sqrt(2))
    assert compare([high, harder], [low] * 2).half == pytest.approx(both, rel=1e-4)


def test_student_s_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in range(1, 201):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-3)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_window_decides_nothing(seeds: int) -> None:
    low, high = (windows([nll], [100]) for nll in (300.0, 400.0))
    found = compare([low] * seeds, [high] * seeds)
    assert found.value == pytest.approx(-1.0) and found.half is None
    assert found.as_dict()["interval"] is None
    assert verdict(found, Pattern("it is so", distilled("arm"), dense(), "below")) == "not decided"


def test_what_text_and_reference_share_adds_no_error() -> None:
    text = measured(3.0, 2.0)
    harder = windows([nll + 10.0 for nll in text.window_nll], text.window_tokens)
    found = compare([harder], [text])
    assert (found.value, found.half) == pytest.approx((0.1, 0.0))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for trial in range(300):
        seeds = rng.normal(0.2, 0.05, 3)
        results = [measured(3.0 + shift, 0.2, seed=3 * trial + i) for i, shift in enumerate(seeds)]
        found = compare(results, [measured(3.0)] * 3)
        assert found.half is not None
        hits += abs(found.value - 0.2) <= found.half
    assert 0.92 <= hits / 300 <= 1.0


def test_an_interval_of_five_windows_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for nll in rng.normal(0.2, 0.1, (2000, 5)):
        result, reference = (windows(nlls, [1] * 5) for nlls in (nll.tolist(), [0.0] * 5))
        found = compare([result], [reference])
        assert found.half is not None
        hits += abs(found.value - 0.2) <= found.half
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("low", "high", "side", "wanted"),
    [
        (-0.2, -0.1, "below", "holds"),
        (-0.2, -0.1, "above", "does not hold"),
        (0.1, 0.2, "above", "holds"),
        (0.1, 0.2, "below", "does not hold"),
        (-0.1, 0.1, "below", "not decided"),
        (0.0, 0.0, "below", "does not hold"),  # the same weights: nothing was gained
        (0.0, 0.0, "above", "does not hold"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, side: str, wanted: str) -> None:
    pattern = Pattern("it is so", distilled("arm"), dense(), side)  # type: ignore[arg-type]
    assert verdict(Comparison((low + high) / 2, None, (high - low) / 2), pattern) == wanted


@pytest.mark.parametrize(("floor", "scale", "power"), [(0.1, 50.0, 0.6), (0.0, 3.0, 0.2)])
def test_the_recovery_curve_is_found_again(floor: float, scale: float, power: float) -> None:
    tokens = np.linspace(20_000, 300_000, 12)
    fit = fit_recovery(tokens.tolist(), (floor + scale * tokens**-power).tolist())
    assert fit.error < 1e-6
    assert (fit.floor, fit.power) == (pytest.approx(floor, abs=1e-3), pytest.approx(power, rel=0.01))
    gap = floor + scale * 1e6**-power
    assert fit.tokens_for(gap) == pytest.approx(1e6, rel=0.02)
    assert fit.tokens_for(floor / 2) is None if floor else fit.tokens_for(-0.1) is None
