"""Comparisons over seeds and over the windows of a text, in nats a token, with 95 % intervals.

Two things are uncertain: another seed would have trained another model, and another text would have been measured. The
first is the sample standard deviation over seeds, the second the paired standard error over windows, each with
Student's t for its number of seeds or windows; an interval holds both. With one seed the first is unknown, and no
deviation is given. With one window the second is unknown, and there is no interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsekd.evaluate import Perplexity, mean_and_error
from sparsekd.records import Record, exponential

_NORMAL = 1.959964  # the standard normal distribution's 97.5 % quantile
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %, by degrees of freedom


@dataclass(frozen=True)
class Comparison:
    """A difference of log-perplexities; its exponential is a ratio of perplexities."""

    value: float
    deviation: float | None  # over seeds; None with one seed
    half: float | None  # half the length of the 95 % interval; None: unknown

    @property
    def ratio(self) -> float:
        return exponential(self.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the ratio."""
        return None if self.half is None else (exponential(self.value - self.half), exponential(self.value + self.half))

    def as_dict(self) -> Record:
        interval = self.interval and list(self.interval)
        return {"ratio": self.ratio, "interval": interval, "nats": self.value, "deviation": self.deviation}


def compare(results: Sequence[Perplexity], references: Sequence[Perplexity]) -> Comparison:
    """Log-perplexity of `results` over `references`, seed by seed, of the same windows."""
    differences = [
        np.array(result.window_nll) - np.array(reference.window_nll)
        for result, reference in zip(results, references, strict=True)
    ]
    tokens = results[0].window_tokens
    by_seed = [float(difference.sum()) / sum(tokens) for difference in differences]
    text_error = mean_and_error(np.mean(differences, axis=0).tolist(), tokens).standard_error
    half = None if text_error is None else student(len(tokens) - 1) * text_error
    return _with_seeds(by_seed, half)


def _with_seeds(by_seed: Sequence[float], text_half: float | None) -> Comparison:
    """The mean over seeds; `text_half` is half of the interval that the text alone makes."""
    value = statistics.fmean(by_seed)
    if len(by_seed) == 1:
        return Comparison(value, None, text_half)
    deviation = statistics.stdev(by_seed)
    half = student(len(by_seed) - 1) * deviation / math.sqrt(len(by_seed))
    return Comparison(value, deviation, None if text_half is None else math.hypot(text_half, half))


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: an interval of 95 % reaches so many standard errors to either side.

    Beyond the table it is the asymptotic expansion (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z, n = _NORMAL, degrees
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


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
