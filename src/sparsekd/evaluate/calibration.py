"""Does a model know what it does not know? Its confidence against how often it is right.

With p the predicted distribution, y the token that came, c = max p the confidence and a = 1 where argmax p = y:

    expected calibration error  sum over bins of n_b / n |mean a - mean c|; Guo et al. 2017 (arXiv:1706.04599), eq. 3,
                                in bins of equal mass; Nguyen and O'Connor 2015 (arXiv:1508.05154)
    Brier score                 mean of sum_v (p_v - [v = y])^2 = sum_v p_v^2 - 2 p_y + 1, from 0 to 2; Brier 1950
    entropy                     mean of -sum_v p_v ln p_v, in nats; of a calibrated model it equals the loss
    overconfidence              mean c - mean a

The calibration error of few tokens is too high even for a perfect model: a bin's chance deviation counts as error.

Shape letters: N predictions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.evaluate.windows import CHUNK, Estimate, Prediction, equal_mass_bins, mean_and_error

NUM_BINS = 15  # as Guo et al.


@dataclass(frozen=True)
class Bin:
    """Predictions of about equal confidence."""

    confidence: float
    accuracy: float
    num_tokens: int


@dataclass(frozen=True)
class Calibration:
    """Over the predictions that the strict protocol counts."""

    expected_calibration_error: float
    overconfidence: Estimate
    confidence: Estimate
    accuracy: Estimate
    brier: Estimate
    entropy: Estimate  # nats
    bins: list[Bin]


class Confidences:
    """Collects calibration over windows: two numbers a prediction, and sums by window."""

    def __init__(self) -> None:
        self._confidence: list[np.ndarray] = []
        self._right: list[np.ndarray] = []
        self._brier: list[float] = []
        self._entropy: list[float] = []

    def add(self, prediction: Prediction) -> None:
        fresh = prediction.window.fresh
        confidence, right, brier, entropy = confidences(*(value[fresh:] for value in prediction[1:])).T
        self._confidence.append(confidence.numpy())
        self._right.append(right.numpy())
        self._brier.append(float(brier.sum()))
        self._entropy.append(float(entropy.sum()))

    def result(self) -> Calibration:
        counts = [len(right) for right in self._right]
        confidence = [float(values.sum()) for values in self._confidence]
        right = [float(values.sum()) for values in self._right]
        excess = [c - a for c, a in zip(confidence, right, strict=True)]
        bins = _bins(np.concatenate(self._confidence), np.concatenate(self._right))
        gaps = sum(b.num_tokens * abs(b.accuracy - b.confidence) for b in bins)
        return Calibration(
            expected_calibration_error=gaps / sum(counts),
            overconfidence=mean_and_error(excess, counts),
            confidence=mean_and_error(confidence, counts),
            accuracy=mean_and_error(right, counts),
            brier=mean_and_error(self._brier, counts),
            entropy=mean_and_error(self._entropy, counts),
            bins=bins,
        )


def confidences(
    log_probs: Float[Tensor, "N V"], likeliest: Int[Tensor, " N"], labels: Int[Tensor, " N"]
) -> Float[Tensor, "N 4"]:
    """Confidence, whether it was right (0 or 1), Brier score and entropy of each prediction, in float64 on the CPU."""
    parts = []
    for log_p, best, y in zip(log_probs.split(CHUNK), likeliest.split(CHUNK), labels.split(CHUNK), strict=True):
        p = log_p.exp()
        confidence, of_label = p.gather(-1, torch.stack([best, y], -1)).unbind(-1)
        brier = torch.linalg.vector_norm(p, dim=-1).square() - 2 * of_label + 1
        entropy = -p.mul_(log_p).sum(-1)
        parts.append(torch.stack([confidence, (best == y).float(), brier, entropy], -1).cpu().double())
    return torch.cat(parts)


def _bins(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    place = equal_mass_bins(confidence, NUM_BINS)
    members = [place == number for number in np.unique(place)]
    return [Bin(float(confidence[m].mean()), float(right[m].mean()), int(m.sum())) for m in members]
