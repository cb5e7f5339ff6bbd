"""Perplexity by a sliding window, in the paper's protocol and in the strict one, from one pass over the text.

The paper (section IV-A) counts every prediction of every window, so most tokens count twice, once with little
context. The strict protocol counts a token only in the first window that predicts it; that is what other tools report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import records
from sparsekd.corpus import beginning
from sparsekd.errors import DataError
from sparsekd.evaluate.windows import (
    Estimate,
    Prediction,
    Window,
    choose,
    mean_and_error,
    predicted_in,
    predictions,
    split,
    token_ids,
)
from sparsekd.models import real_vocab_size
from sparsekd.records import Record


@dataclass(frozen=True)
class Perplexity:
    """`window_nll` and `window_tokens` are the strict protocol's sums by window, in nats, for paired comparisons."""

    perplexity: float  # strict protocol
    standard_error: float | None  # None: there is one window only
    bits_per_byte: float  # strict protocol, per UTF-8 byte of the scored text
    num_tokens: int  # scored in the strict protocol
    paper_perplexity: float
    paper_standard_error: float | None
    paper_num_tokens: int
    context: int
    stride: int
    window_nll: list[float]
    window_tokens: list[int]

    def as_dict(self) -> Record:
        return asdict(self)


def perplexity_of(result: Record) -> Perplexity:
    """From what `as_dict` gave, whatever stands beside it."""
    return Perplexity(**{field.name: result[field.name] for field in fields(Perplexity)})


class Losses:
    """Negative log-likelihood of every prediction of every window, to be counted as either protocol does."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._nll: list[np.ndarray] = []

    def add(self, prediction: Prediction) -> None:
        """Windows come in the order of the text. Raises `DataError` for a loss that is not finite: a window is never
        left out."""
        nll = -prediction.log_probs.gather(-1, prediction.labels[:, None])[:, 0].cpu().double()
        if not bool(torch.isfinite(nll).all()):
            raise DataError(
                "the model's loss on the evaluation text is not finite: its weights are damaged, or its number "
                "format is too narrow: try model.dtype=float32, or sparsekd eval --dtype float32"
            )
        self._windows.append(prediction.window)
        self._nll.append(nll.numpy())

    def result(self, num_bytes: int, context: int, stride: int) -> Perplexity:
        """`num_bytes` is what the strict protocol's tokens take as UTF-8."""
        fresh = [nll[window.fresh :] for nll, window in zip(self._nll, self._windows, strict=True)]
        window_nll, window_tokens = [float(nll.sum()) for nll in fresh], [len(nll) for nll in fresh]
        value, error = _exponential(mean_and_error(window_nll, window_tokens))
        paper, paper_error = _exponential(self._paper())
        return Perplexity(
            perplexity=value,
            standard_error=error,
            bits_per_byte=sum(window_nll) / math.log(2) / max(1, num_bytes),
            num_tokens=sum(window_tokens),
            paper_perplexity=paper,
            paper_standard_error=paper_error,
            paper_num_tokens=sum(map(len, self._nll)),
            context=context,
            stride=stride,
            window_nll=window_nll,
            window_tokens=window_tokens,
        )

    def _paper(self) -> Estimate:
        """A token's predictions in several windows rise and fall together: all are of the cluster of the first one."""
        ends = [window.end for window in self._windows]
        tokens = [np.arange(window.start + 1, window.end) for window in self._windows]
        clusters = np.searchsorted(ends, np.concatenate(tokens), side="right")  # the first window that reaches so far
        sums = np.bincount(clusters, np.concatenate(self._nll))
        return mean_and_error(sums.tolist(), np.bincount(clusters).tolist())


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    stride: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 2,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> Perplexity:
    """Perplexity of `model` on `text`, or in windows spread over it that score about `max_tokens` tokens.

    Raises `DataError` for a text of fewer than two tokens or a loss that is not finite; `ResourceError` for windows
    that memory does not hold.
    """
    ids = token_ids(tokenizer, text)
    windows = choose(split(len(ids), context, stride), max_tokens)
    losses = Losses()
    vocab_size, begin = real_vocab_size(model, tokenizer), beginning(tokenizer)
    for prediction in predictions(model, ids, windows, batch_size, vocab_size, begin):
        losses.add(prediction)
        on_tokens(len(prediction.labels))
    return losses.result(scored_bytes(tokenizer, ids, windows), context, stride)


def perplexity_in(
    runtime: Callable[[Int[Tensor, "1 L"]], Float[Tensor, "1 L V"]],
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    stride: int = 256,
    max_tokens: int | None = None,
) -> Perplexity:
    """The same of a model in any runtime, which turns tokens into logits, of which `vocab_size` are of real tokens."""
    ids = token_ids(tokenizer, text)
    windows = choose(split(len(ids), context, stride), max_tokens)
    losses, begin = Losses(), beginning(tokenizer)
    for window in windows:
        row = torch.cat([ids.new_tensor(begin), ids[window.start : window.end]])
        logits = runtime(row[None])[0, len(begin) : -1, :vocab_size]
        losses.add(predicted_in(window, logits, row[len(begin) + 1 :]))
    return losses.result(scored_bytes(tokenizer, ids, windows), context, stride)


def ratio(model: Perplexity, reference: Perplexity) -> tuple[float, float | None]:
    """`model`'s strict perplexity over `reference`'s on the same text, and the standard error of that ratio, None if
    there is one window only.

    The windows are compared in pairs, so the text's own difficulty, common to both, adds nothing to the error.
    """
    if model.window_tokens != reference.window_tokens:
        raise DataError("the two perplexities were measured on different text or windows")
    differences = [a - b for a, b in zip(model.window_nll, reference.window_nll, strict=True)]
    return _exponential(mean_and_error(differences, model.window_tokens))


def scored_bytes(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " T"], windows: Sequence[Window]) -> int:
    """UTF-8 bytes of the tokens that the strict protocol scores in `windows`, which are in the order of the text."""
    runs: list[tuple[int, int]] = []  # scored tokens [first, end) without a gap
    for start, end, fresh in windows:
        first = start + 1 + fresh
        if runs and runs[-1][1] == first:
            first = runs.pop()[0]
        runs.append((first, end))
    # beside the token before it, since some tokenizers leave out a space at the beginning of what they decode
    return sum(
        _num_bytes(tokenizer, ids[first - 1 : end]) - _num_bytes(tokenizer, ids[first - 1 : first])
        for first, end in runs
    )


def _num_bytes(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " T"]) -> int:
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return len(text.encode())


def _exponential(nats: Estimate) -> tuple[float, float | None]:
    """What a mean logarithm and its standard error are of, to first order."""
    value = records.exponential(nats.value)
    return value, None if nats.standard_error is None else value * nats.standard_error
