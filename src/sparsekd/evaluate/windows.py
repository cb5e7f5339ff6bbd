"""A text as overlapping windows, a model's predictions in them, and means with the spread over windows.

Windows of `context` tokens start every `stride` tokens; the last one is shorter, never padded. The first token of the
text is not predicted by anything. Position m of a window predicts its token m + 1.

Shape letters: T tokens of the text, B windows, M predictions of a window, V vocabulary, N values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.corpus import encode
from sparsekd.errors import DataError
from sparsekd.logits import logits_of

CHUNK = 128  # predictions whose distribution is worked out at once; bounds the temporaries beside the logits


class Window(NamedTuple):
    """Tokens [start, end) of the text; the predictions before `fresh` were made by an earlier window as well."""

    start: int
    end: int
    fresh: int


class Prediction(NamedTuple):
    """A model's predictions in one window."""

    window: Window
    logits: Float[Tensor, "M V"]
    labels: Int[Tensor, " M"]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error from the spread over windows."""

    value: float
    standard_error: float


def token_ids(tokenizer: Any, text: str, max_tokens: int | None) -> Int[Tensor, " T"]:
    """The text's first `max_tokens` tokens (all by default); raises `DataError` for fewer than two."""
    ids = torch.tensor(encode(tokenizer, text)[:max_tokens])
    if len(ids) < 2:
        raise DataError("the evaluation text has fewer than two tokens")
    return ids


def split(num_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows of a text; together, their fresh predictions cover a token at most once."""
    windows = []
    predicted = 1  # tokens [1, predicted) have been predicted already
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        if end - start >= 2:
            windows.append(Window(start, end, max(predicted, start + 1) - start - 1))
            predicted = end
        if end == num_tokens:
            break
    return windows


def predictions(
    model: PreTrainedModel, ids: Int[Tensor, " T"], windows: list[Window], batch_size: int
) -> Iterator[Prediction]:
    """The model's predictions window by window; `batch_size` windows of equal length go through it together.

    Run it inside `torch.inference_mode()`. Logits stay on the model's device.
    """
    for _, equal in itertools.groupby(windows, key=lambda window: window.end - window.start):
        same_length = list(equal)
        for first in range(0, len(same_length), batch_size):
            batch = same_length[first : first + batch_size]
            rows = torch.stack([ids[window.start : window.end] for window in batch]).to(model.device)
            logits = logits_of(model, input_ids=rows)[:, :-1]
            yield from map(Prediction, batch, logits, rows[:, 1:])
            del logits  # before the next batch makes its own


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean a token of values summed by window, and its standard error from the spread of the windows.

    Tokens of one window rise and fall together, so the windows are the sample: the ratio estimator for clusters of
    unequal size (Cochran, Sampling Techniques, 3rd edition, eq. 6.13). The error of a single window is unknown: 0.
    """
    total = sum(counts)
    mean = sum(sums) / total
    if len(sums) < 2:
        return Estimate(mean, 0.0)
    squares = sum((s - n * mean) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total)


def equal_mass_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin, 0 to num_bins - 1 in rising order, of each of N values, so that bins hold about equally many.

    Equal values share a bin, that of the middle of their ranks; with many ties a bin can be empty.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    return (middle / len(values) * num_bins).astype(np.int64)[place]
