"""All that is measured on a text, of several models side by side, from one pass of each over the same windows.

Going side by side, the teacher's full distributions need not be stored to be compared with.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.corpus import beginning
from sparsekd.errors import DataError
from sparsekd.evaluate.agreement import Agreement, Distances
from sparsekd.evaluate.calibration import Calibration, Confidences
from sparsekd.evaluate.perplexity import Losses, Perplexity, scored_bytes
from sparsekd.evaluate.windows import choose, predictions, split, token_ids
from sparsekd.models import real_vocab_size
from sparsekd.records import Record


@dataclass(frozen=True)
class Measurement:
    """What a text says about a model; `agreement` is None for the teacher itself, and without one."""

    perplexity: Perplexity
    calibration: Calibration
    agreement: Agreement | None

    def as_dict(self) -> Record:
        """Perplexity's fields, and `calibration` and `agreement` beside them."""
        agreement = None if self.agreement is None else asdict(self.agreement)
        return self.perplexity.as_dict() | {"calibration": asdict(self.calibration), "agreement": agreement}


@torch.inference_mode()
def measure(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    teacher: str | None = None,
    token_counts: Int[Tensor, " V"] | None = None,
    context: int = 512,
    stride: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 2,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Measurement]:
    """Measures each of `models`, which share `tokenizer`, on `text`, or in windows spread over it that score about
    `max_tokens` tokens.

    `teacher` names the model that the others are compared with. `token_counts` says how frequent each token is, for
    agreement by frequency; None counts in the text itself. Raises `DataError` for a text of fewer than two tokens, a
    loss that is not finite, and models whose vocabularies, without padding, differ in size; `ResourceError` for windows
    that memory does not hold.
    """
    sizes = {name: real_vocab_size(model, tokenizer) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"models are compared over one vocabulary, found sizes {found}")
    ids = token_ids(tokenizer, text)
    if token_counts is None:
        token_counts = torch.bincount(ids)
    losses = {name: Losses() for name in models}
    confidences = {name: Confidences() for name in models}
    distances = {name: Distances(token_counts, ids) for name in models if teacher and name != teacher}
    windows = choose(split(len(ids), context, stride), max_tokens)
    begin = beginning(tokenizer)
    passes = [predictions(model, ids, windows, batch_size, sizes[name], begin, say) for name, model in models.items()]
    for found in zip(*passes, strict=True):
        by_name = dict(zip(models, found, strict=True))
        for name, prediction in by_name.items():
            losses[name].add(prediction)
            confidences[name].add(prediction)
            if teacher and name in distances:
                distances[name].add(prediction, by_name[teacher])
            on_tokens(len(prediction.labels))
        del found, by_name, prediction  # a batch's logits go before the next batch's come
    num_bytes = scored_bytes(tokenizer, ids, windows)
    return {
        name: Measurement(
            losses[name].result(num_bytes, context, stride),
            confidences[name].result(),
            distances[name].result() if name in distances else None,
        )
        for name in models
    }
