"""How far a model is from its teacher on the same text: KL over the whole vocabulary, and whether both choose the
same token; overall and by how frequent the token is that came.

    KL(p || q) = sum_v p_v (ln p_v - ln q_v)   nats a token, p the teacher's distribution, q the model's

Shape letters: N predictions, V vocabulary, T tokens of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.evaluate.windows import CHUNK, Estimate, Prediction, equal_mass_bins, mean_and_error

NUM_BINS = 5


@dataclass(frozen=True)
class FrequencyBin:
    """About a fifth of the text: the predictions of tokens that occur `least` to `most` times in what was counted."""

    least: int
    most: int
    kl: Estimate
    top1: Estimate
    num_tokens: int


@dataclass(frozen=True)
class Agreement:
    """Over the predictions that the strict protocol counts."""

    kl: Estimate  # nats a token
    top1: Estimate  # share of predictions whose likeliest token is the teacher's
    by_frequency: list[FrequencyBin]  # rare tokens first


class Distances:
    """Collects the distance to the teacher over windows, as sums by window and frequency bin."""

    def __init__(self, token_counts: Int[Tensor, " V"], ids: Int[Tensor, " T"]):
        self._counts = token_counts[ids].numpy()  # of each token of the text
        self._bins = equal_mass_bins(self._counts, NUM_BINS)
        self._sums: list[np.ndarray] = []  # of a window: 3 x bins, the sums of KL, of agreement, and the counts

    def add(self, prediction: Prediction, teacher: Prediction) -> None:
        """`teacher` predicts the same window."""
        start, end, fresh = prediction.window
        bins = self._bins[start + 1 + fresh : end]
        kl = divergences(prediction.log_probs[fresh:], teacher.log_probs[fresh:]).numpy()
        agrees = (prediction.likeliest == teacher.likeliest)[fresh:].cpu().double().numpy()
        weights = (kl, agrees, np.ones(len(bins)))
        self._sums.append(np.stack([np.bincount(bins, each, minlength=NUM_BINS) for each in weights]))

    def result(self) -> Agreement:
        sums = np.stack(self._sums)
        kl, top1, _ = _estimates(sums.sum(-1))
        return Agreement(kl, top1, [self._bin(b, sums[..., b]) for b in range(NUM_BINS) if sums[:, 2, b].any()])

    def _bin(self, number: int, sums: np.ndarray) -> FrequencyBin:
        members = self._counts[self._bins == number]
        return FrequencyBin(int(members.min()), int(members.max()), *_estimates(sums))


def divergences(log_probs: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(teacher || model) in nats, from log-probabilities, in float64 on the CPU."""
    parts = []
    for log_q, log_p in zip(log_probs.split(CHUNK), teacher.split(CHUNK), strict=True):
        parts.append((log_p - log_q).mul_(log_p.exp()).sum(-1).cpu().double())
    return torch.cat(parts)


def _estimates(sums: np.ndarray) -> tuple[Estimate, Estimate, int]:
    """KL, top-1 agreement and number of predictions, from rows of (KL, agreement, count) by window."""
    kl, agrees, counts = sums.T
    counts = counts.astype(int).tolist()
    return mean_and_error(kl.tolist(), counts), mean_and_error(agrees.tolist(), counts), sum(counts)
