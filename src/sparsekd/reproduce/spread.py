"""Comparisons over seeds and over the windows of a text, in nats a token, with 95 % intervals.

Two things are uncertain: another seed would have trained another model, and another text would have been measured. The
first is the sample standard deviation over seeds with Student's t, the second the paired standard error over windows;
an interval holds both. With one seed the first is unknown, and no deviation is given. With one window the second is
unknown, and there is no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsekd.evaluate.windows import mean_and_error

_NORMAL = 1.96
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %, by degrees of freedom


@dataclass(frozen=True)
class Comparison:
    """A difference of log-perplexities; its exponential is a ratio of perplexities."""

    value: float
    deviation: float | None  # over seeds; None with one seed
    half: float | None  # of the 95 % interval, on either side of the value; None: unknown

    @property
    def ratio(self) -> float:
        return _exp(self.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the ratio."""
        return None if self.half is None else (_exp(self.value - self.half), _exp(self.value + self.half))

    def as_dict(self) -> dict[str, Any]:
        interval = self.interval and list(self.interval)
        return {"ratio": self.ratio, "interval": interval, "nats": self.value, "deviation": self.deviation}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a destroyed model stays a number that JSON can hold


def compare(results: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> Comparison:
    """Log-perplexity of `results` over `references`, seed by seed; both as `Perplexity` is written, same windows."""
    differences = [
        np.array(result["window_nll"]) - np.array(reference["window_nll"])
        for result, reference in zip(results, references, strict=True)
    ]
    tokens = results[0]["window_tokens"]
    by_seed = [float(difference.sum()) / sum(tokens) for difference in differences]
    text_error = mean_and_error(np.mean(differences, axis=0).tolist(), tokens).standard_error
    return _estimate(by_seed, text_error)


def _estimate(by_seed: Sequence[float], text_error: float | None) -> Comparison:
    value, half = statistics.fmean(by_seed), None if text_error is None else _NORMAL * text_error
    if len(by_seed) == 1:
        return Comparison(value, None, half)
    deviation = statistics.stdev(by_seed)
    if half is not None:
        student = _STUDENT[min(len(by_seed) - 1, len(_STUDENT)) - 1]
        half = math.hypot(half, student * deviation / math.sqrt(len(by_seed)))
    return Comparison(value, deviation, half)


@dataclass(frozen=True)
class Recovery:
    """`floor + scale * tokens^-power`: the gap, in nats, that is left after training on so many tokens."""

    floor: float
    scale: float
    power: float
    error: float  # root mean square of the residuals

    def tokens_for(self, gap: float) -> float | None:
        """Tokens until the gap is at most `gap`; None if the curve never gets there."""
        if self.scale <= 0 or gap <= self.floor:
            return None
        return ((gap - self.floor) / self.scale) ** (-1 / self.power)


def fit_recovery(tokens: Sequence[float], gaps: Sequence[float]) -> Recovery:
    """Least squares over a grid of powers; the floor is not below zero. Needs three points after the start."""
    x, y = np.array(tokens, float), np.array(gaps, float)
    best: Recovery | None = None
    for power in np.linspace(0.05, 2.0, 196):
        basis = x**-power
        centred = basis - basis.mean()
        scale = float(centred @ (y - y.mean()) / (centred @ centred))
        floor = float(y.mean() - scale * basis.mean())
        if floor < 0:
            floor, scale = 0.0, float(basis @ y / (basis @ basis))
        error = float(np.sqrt(np.mean((floor + scale * basis - y) ** 2)))
        if best is None or error < best.error:
            best = Recovery(floor, scale, float(power), error)
    assert best is not None
    return best
