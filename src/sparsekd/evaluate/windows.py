"""A text as overlapping windows, a model's predictions in them, and means with the spread over windows.

Windows of `context` tokens start every `stride` tokens; the last one is shorter, never padded. The first token of the
text is not predicted by anything. Position m of a window predicts its token m + 1. What the tokenizer by default puts
before a text goes ahead of every window, beside its `context` tokens, and is not predicted either.

Shape letters: T tokens of the text, B windows, L tokens of a window, M predictions of it, V vocabulary, N values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.corpus import encode
from sparsekd.device import Batches
from sparsekd.errors import DataError
from sparsekd.models import logits_of

CHUNK = 64  # predictions whose distribution is worked out at once; bounds the temporaries beside the logits


class Window(NamedTuple):
    """Tokens [start, end) of the text; the predictions before `fresh` were made by an earlier window as well."""

    start: int
    end: int
    fresh: int


class Prediction(NamedTuple):
    """A model's predictions in one window."""

    window: Window
    log_probs: Float[Tensor, "M V"]
    likeliest: Int[Tensor, " M"]
    labels: Int[Tensor, " M"]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error from the spread over windows; None: one window has no spread."""

    value: float
    standard_error: float | None


def token_ids(tokenizer: Any, text: str) -> Int[Tensor, " T"]:
    """The text's tokens; raises `DataError` for fewer than two."""
    ids = torch.tensor(encode(tokenizer, text))
    if len(ids) < 2:
        raise DataError("an evaluation text has fewer than two tokens: give a longer one")
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


def choose(windows: list[Window], max_tokens: int | None) -> list[Window]:
    """As many of a text's windows, evenly spaced, as score about `max_tokens` tokens in the strict protocol; at least
    one, and all by default.

    Each counts what it counts among all of them, so their mean estimates the whole text's. The beginning of a text,
    which may be one article of many, says less about it.
    """
    scored = sum(window.end - window.start - 1 - window.fresh for window in windows)
    if max_tokens is None or scored <= max_tokens:
        return windows
    count = max(1, round(len(windows) * max_tokens / scored))
    return [windows[(2 * i + 1) * len(windows) // (2 * count)] for i in range(count)]


def predictions(
    model: PreTrainedModel,
    ids: Int[Tensor, " T"],
    windows: list[Window],
    batch_size: int,
    vocab_size: int,
    begin: Sequence[int] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Prediction]:
    """The model's predictions of the first `vocab_size` tokens, those beyond being padding, window by window;
    `batch_size` windows of equal length go through it together, each after what a text has to `begin` with.

    Run it inside `torch.inference_mode()`. What it gives stays on the model's device. Where memory runs out, half as
    many windows go together, which `say` hears of; raises `ResourceError` when it does not hold a single one.
    """
    batches = Batches(batch_size, "evaluate.batch_size", "evaluate.context", say)

    def predict(batch: Sequence[Window]) -> list[Prediction]:
        rows = torch.stack([torch.cat([ids.new_tensor(begin), ids[window.start : window.end]]) for window in batch])
        rows = rows.to(model.device)
        logits = logits_of(model, input_ids=rows)[:, len(begin) : -1, :vocab_size]
        return list(map(predicted_in, batch, logits, rows[:, len(begin) + 1 :]))

    for _, equal in itertools.groupby(windows, key=lambda window: window.end - window.start):
        for predicted in batches.run(list(equal), predict):
            yield from predicted
            del predicted  # before the next batch makes its own


def predicted_in(window: Window, logits: Float[Tensor, "M V"], labels: Int[Tensor, " M"]) -> Prediction:
    """From a window's logits, which become float32 log-probabilities in place where they are float32."""
    log_probs = logits.float()
    likeliest = []
    for chunk in log_probs.split(CHUNK):
        chunk.copy_(chunk.log_softmax(-1))
        likeliest.append(chunk.max(-1).indices)
    return Prediction(window, log_probs, torch.cat(likeliest), labels)


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Mean a token of values summed by window, and its standard error from the spread of the windows.

    Tokens of one window rise and fall together, so the windows are the sample: the ratio estimator for clusters of
    unequal size (Cochran, Sampling Techniques, 3rd edition, eq. 6.13). Windows without such a token say nothing.
    """
    total = sum(counts)
    mean = sum(sums) / total
    num_windows = sum(n > 0 for n in counts)
    if num_windows < 2:
        return Estimate(mean, None)
    squares = sum((s - n * mean) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(squares * num_windows / (num_windows - 1)) / total)


def equal_mass_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin, 0 to num_bins - 1 in rising order, of each of N values, so that bins hold about equally many.

    Equal values share a bin, that of the middle of their ranks; with many ties a bin can be empty.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    return (middle / len(values) * num_bins).astype(np.int64)[place]
