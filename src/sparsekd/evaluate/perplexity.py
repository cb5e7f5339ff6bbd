"""Perplexity by a sliding window, in the paper's protocol and in the strict one, from one pass over the text.

The paper (section IV-A) counts every prediction of every window, so most tokens count twice, once with little
context. The strict protocol counts a token only in the first window that predicts it; that is what other tools report.
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

from sparsekd.errors import DataError
from sparsekd.evaluate.windows import CHUNK, Prediction, mean_and_error, predictions, split, token_ids


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


class Losses:
    """Sums of negative log-likelihood by window, as both protocols count them."""

    def __init__(self) -> None:
        self._strict: list[tuple[float, int]] = []
        self._paper: list[tuple[float, int]] = []

    def add(self, prediction: Prediction) -> None:
        """Raises `DataError` for a loss that is not finite: a window is never left out."""
        nll = token_nll(prediction.logits, prediction.labels)
        if not bool(torch.isfinite(nll).all()):
            raise DataError("the model's loss on the evaluation text is not finite")
        fresh = nll[prediction.window.fresh :]
        self._strict.append((float(fresh.sum()), len(fresh)))
        self._paper.append((float(nll.sum()), len(nll)))

    def result(self, scored_text: str, context: int, stride: int) -> Perplexity:
        window_nll, window_tokens = map(list, zip(*self._strict, strict=True))
        strict = mean_and_error(window_nll, window_tokens)
        paper = mean_and_error(*map(list, zip(*self._paper, strict=True)))
        return Perplexity(
            perplexity=_exp(strict.value),
            standard_error=_exp(strict.value) * strict.standard_error,
            bits_per_byte=sum(window_nll) / math.log(2) / max(1, len(scored_text.encode())),
            num_tokens=sum(window_tokens),
            paper_perplexity=_exp(paper.value),
            paper_standard_error=_exp(paper.value) * paper.standard_error,
            paper_num_tokens=sum(count for _, count in self._paper),
            context=context,
            stride=stride,
            window_nll=window_nll,
            window_tokens=window_tokens,
        )


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
    ids = token_ids(tokenizer, text, max_tokens)
    losses = Losses()
    for prediction in predictions(model, ids, split(len(ids), context, stride), batch_size):
        losses.add(prediction)
        on_tokens(len(prediction.labels))
    return losses.result(decode(tokenizer, ids[1:]), context, stride)


def ratio(model: Perplexity, reference: Perplexity) -> tuple[float, float]:
    """`model`'s strict perplexity over `reference`'s on the same text, and the standard error of that ratio.

    The windows are compared in pairs, so the text's own difficulty, common to both, adds nothing to the error.
    """
    if model.window_tokens != reference.window_tokens:
        raise DataError("the two perplexities were measured on different text or windows")
    differences = [a - b for a, b in zip(model.window_nll, reference.window_nll, strict=True)]
    logarithm = mean_and_error(differences, model.window_tokens)
    return _exp(logarithm.value), _exp(logarithm.value) * logarithm.standard_error


def token_nll(logits: Float[Tensor, "M V"], labels: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Nats for each predicted token, in float64 on the CPU; the logarithm is taken in float32."""
    pairs = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(z.float(), y, reduction="none") for z, y in pairs]).cpu().double()


def decode(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " T"]) -> str:
    """The text of token ids, every byte of it."""
    text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a destroyed model stays a number that JSON can hold
