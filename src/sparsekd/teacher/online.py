"""The teacher as a model: one, or a mixture of several, and what it believes of blocks that it is shown.

Shape letters: B blocks, L positions, N positions of one block, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sparsekd.errors import UsageError
from sparsekd.models import document_inputs, logits_of, shared_vocab_size
from sparsekd.teacher.codecs import Targets, codec_for
from sparsekd.teacher.selecting import by_chunks, top_k_distribution


class Mixture:
    """Several teachers as one, whose distribution is the weighted mean of theirs p_i: the arithmetic one sum_i w_i p_i
    or the geometric one, prod_i p_i^w_i normalised, which is softmax(sum_i w_i z_i) of their logits z_i.

    Of all distributions p the arithmetic mean has the least sum_i w_i KL(p_i, p), and the geometric one, which gives
    little to a token that one teacher gives little, the least sum_i w_i KL(p, p_i) (Abbas 2009).

    The teachers may differ in size and architecture, but a token id must mean the same to all; where their embeddings
    are padded differently, the tokens that all know count. `weights` are positive and matter by their ratios only.
    Raises `UsageError` for weights that cannot be used, `MismatchError` for vocabularies that do not match.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        weights: Sequence[float],
        mean: Literal["arithmetic", "geometric"] = "arithmetic",
    ):
        if not models or len(models) != len(weights):
            raise UsageError(
                f"a mixture of {len(models)} teachers with {len(weights)} weights: expected at least one teacher, and "
                "a weight for each"
            )
        for number, weight in enumerate(weights, start=1):
            if not 0 < weight < math.inf:
                raise UsageError(f"the weight of teacher {number} is {weight}: expected a number above 0")
        configs = [model.config.get_text_config() for model in models]
        sizes = {f"teacher {number}": int(config.vocab_size) for number, config in enumerate(configs, start=1)}
        contexts = [context for context in map(context_of, models) if context is not None]
        self.models, self.mean = list(models), mean
        self.weights = [weight / math.fsum(weights) for weight in weights]
        shared: dict[str, Any] = {
            "vocab_size": shared_vocab_size(sizes),
            "max_position_embeddings": min(contexts, default=None),
        }
        self.config = PreTrainedConfig(**shared)  # what a single model's config is asked for


TeacherModel = PreTrainedModel | Mixture


def members(model: TeacherModel) -> list[PreTrainedModel]:
    """The models that a teacher consists of."""
    return model.models if isinstance(model, Mixture) else [model]


def context_of(model: TeacherModel) -> int | None:
    """The longest block that a model takes; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.inference_mode()
def distributions(
    model: TeacherModel,
    tokens: Int[Tensor, "B L"],
    top_k: int,
    vocab_size: int | None = None,
    separator: int | None = None,
) -> list[Targets]:
    """Targets of each block, where the model is: row t is the teacher's distribution of token t + 1, over the first
    `vocab_size` ids.

    With a `separator`, the token that ends a document, packed documents do not see each other.
    """
    logits = teacher_logits(model, tokens, vocab_size, separator)
    return [by_chunks(lambda chunk: top_k_distribution(chunk, top_k), block) for block in logits]


def teacher_logits(
    model: TeacherModel, tokens: Int[Tensor, "B L"], vocab_size: int | None, separator: int | None
) -> Float[Tensor, "B N V"]:
    """Of the first `vocab_size` tokens; of a mixture, its log-probabilities up to a constant of each position."""
    if isinstance(model, Mixture):
        known = model.config.vocab_size
        cut = min(vocab_size or known, known)  # before the softmax: padding takes part in no teacher's distribution
        each = (teacher_logits(teacher, tokens, cut, separator).float() for teacher in model.models)
        weighted = zip(each, model.weights, strict=True)
        if model.mean == "geometric":
            return functools.reduce(torch.add, (weight * logits for logits, weight in weighted))
        return functools.reduce(torch.logaddexp, (logits.log_softmax(-1) + math.log(w) for logits, w in weighted))
    inputs = document_inputs(tokens.to(model.device), separator)
    return logits_of(model, **inputs)[:, :-1, :vocab_size]


class Online:
    """The teacher without a cache: its distributions are worked out whenever a block is read."""

    def __init__(
        self,
        model: TeacherModel,
        top_k: int | None = None,
        vocab_size: int | None = None,
        separator: int | None = None,
    ):
        self.vocab_size = vocab_size or int(model.config.get_text_config().vocab_size)
        self._top_k = codec_for("q16", top_k, self.vocab_size).top_k  # as a cache would bound it
        self._model, self._separator = model, separator

    def read(self, block_id: int, tokens: np.ndarray) -> Targets:
        """The distributions of one block, as a `Cache` gives them; `block_id` does not matter here."""
        batch = torch.from_numpy(tokens.astype(np.int64))[None]
        found = distributions(self._model, batch, self._top_k, self.vocab_size, self._separator)[0]
        return Targets(*(column.cpu() for column in found))
