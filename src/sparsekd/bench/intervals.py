"""The median of a few measurements and an interval for it that assumes nothing of how they are spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sparsekd.records import Record

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median between two of the values that it is of."""

    median: float
    low: float
    high: float
    confidence: float  # that the true median is between `low` and `high`

    @property
    def half_width(self) -> float:
        """Of the interval, as a share of the median."""
        return (self.high - self.low) / 2 / self.median

    def as_dict(self) -> Record:
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """The k-th smallest and the k-th largest of n values enclose the median unless fewer than k lie on one side of it,
    each on either side with probability 1/2: with confidence `1 - 2 P(Binomial(n, 1/2) < k)` (David and Nagaraja,
    "Order Statistics", 7.1). k is the largest with 95 %; five values or fewer reach less even with k = 1.
    """
    ordered, n = sorted(values), len(values)
    k = 1
    while k < n / 2 and _confidence(n, k + 1) >= _CONFIDENCE:
        k += 1
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k], _confidence(n, k))


def _confidence(n: int, k: int) -> float:
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
