"""Perplexity by a sliding window, in the paper's protocol and in the strict one, from one pass over the text.

Windows of `context` tokens start every `stride` tokens; the last one is shorter, never padded. The paper (section
IV-A) counts every prediction of every window, so most tokens count twice, once with little context. The strict
protocol counts a token only in the first window that predicts it; that is what other tools report. The first token
of the text is not scored: nothing predicts it.

The standard error comes from the spread of the windows' sums, not of single tokens, because tokens of one window rise
and fall together.

Shape letters: B windows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.corpus import encode
from sparsekd.errors import DataError


@dataclass(frozen=True)
class Perplexity:
    """`window_nll` and `window_tokens` are the strict protocol's sums by window, in nats, for paired comparisons."""

    perplexity: float  # strict protocol
    standard_error: float
    bits_per_byte: float  # strict protocol, per UTF-8 byte of the scored text
    num_tokens: int  # scored in the strict protocol
    paper_perplexity: float
    paper_standard_error: float
    paper_num_tokens: int
    context: int
    stride: int
    window_nll: list[float]
    window_tokens: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    """Perplexity of `model` on the first `max_tokens` tokens of `text` (all of them by default).

    Raises `DataError` for a text of fewer than two tokens or a loss that is not finite.
    """
    ids = torch.tensor(encode(tokenizer, text)[:max_tokens])
    if len(ids) < 2:
        raise DataError("the evaluation text has fewer than two tokens")
    strict_nll, strict_count, paper_nll, paper_count = [], [], [], []
    scored = 1  # tokens [1, scored) have been counted by the strict protocol
    windows = _windows(len(ids), context, stride)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        lengths = {end - start for start, end in batch}
        for rows in [batch] if len(lengths) == 1 else [[window] for window in batch]:
            nll = _token_nll(model, torch.stack([ids[start:end] for start, end in rows]))
            on_tokens(nll.numel())
            for (start, end), window in zip(rows, nll, strict=True):
                fresh = window[max(scored, start + 1) - start - 1 :]
                scored = end
                strict_nll.append(float(fresh.sum()))
                strict_count.append(len(fresh))
                paper_nll.append(float(window.sum()))
                paper_count.append(len(window))
    mean, error = _mean_and_error(strict_nll, strict_count)
    paper_mean, paper_error = _mean_and_error(paper_nll, paper_count)
    scored_text: Any = tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
    num_bytes = len(scored_text.encode())
    return Perplexity(
        perplexity=_exp(mean),
        standard_error=_exp(mean) * error,
        bits_per_byte=sum(strict_nll) / math.log(2) / max(1, num_bytes),
        num_tokens=sum(strict_count),
        paper_perplexity=_exp(paper_mean),
        paper_standard_error=_exp(paper_mean) * paper_error,
        paper_num_tokens=sum(paper_count),
        context=context,
        stride=stride,
        window_nll=strict_nll,
        window_tokens=strict_count,
    )


def ratio(model: Perplexity, reference: Perplexity) -> tuple[float, float]:
    """`model`'s strict perplexity over `reference`'s on the same text, and the standard error of that ratio.

    The windows are compared in pairs, so the text's own difficulty, common to both, adds nothing to the error.
    """
    if model.window_tokens != reference.window_tokens:
        raise DataError("the two perplexities were measured on different text or windows")
    differences = [a - b for a, b in zip(model.window_nll, reference.window_nll, strict=True)]
    mean, error = _mean_and_error(differences, model.window_tokens)
    return _exp(mean), _exp(mean) * error


def _windows(num_tokens: int, context: int, stride: int) -> list[tuple[int, int]]:
    windows = []
    for start in range(0, num_tokens, stride):
        windows.append((start, min(start + context, num_tokens)))
        if start + context >= num_tokens:
            break
    return [(start, end) for start, end in windows if end - start >= 2]


def _token_nll(model: PreTrainedModel, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B M"]:
    """Nats for each predicted token, M = L - 1."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    if not bool(torch.isfinite(nll).all()):
        raise DataError("the model's loss on the evaluation text is not finite")
    return nll.view(ids.shape[0], -1).double().cpu()


def _mean_and_error(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Mean a token, and its standard error from the spread over windows (ratio estimator); 0 for one window."""
    total = sum(counts)
    mean = sum(sums) / total
    if len(sums) < 2:
        return mean, 0.0
    squares = sum((s - n * mean) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a destroyed model stays a number that JSON can hold
