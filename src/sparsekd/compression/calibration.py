"""The text that a method chooses by, and the statistics gathered on it when the method asks.

Blocks come with their ids, by which a cached teacher answers. A statistic is a pass over the text, a layer at a time
on a `device` other than the model's.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import gradients, statistics
from sparsekd.compression.probe import Probe, Teacher
from sparsekd.compression.walk import Walk
from sparsekd.errors import UsageError
from sparsekd.models import MLP, find_mlps, shape


class Batch(NamedTuple):
    """Blocks of equal length, with their ids in the corpus."""

    ids: Sequence[int]
    tokens: Int[Tensor, "B L"]


class Calibration:
    """The blocks, who answers for the teacher on them, and how the statistics are to be taken."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        *,
        seed: int = 42,
        device: torch.device | None = None,
        separator: int | None = None,
        teacher: Teacher | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        """Labels for the curvature are drawn with `seed`. A `device` other than the model's takes the statistics there,
        a layer at a time. With a `separator`, the token that ends a document, packed documents do not see each other.
        `teacher` gives the cached distributions of a block; None: the model's own are worked out. `warn` hears of
        statistics from too few tokens."""
        self.model, self.batches, self.seed = model, list(batches), seed
        self.device, self.separator, self.teacher, self.warn = device, separator, teacher, warn

    @property
    def num_tokens(self) -> int:
        return sum(batch.tokens.numel() for batch in self.batches)

    def require_text(self, method: str) -> None:
        """Raises `UsageError` where there is none."""
        if not self.batches:
            raise UsageError(f"compress.method is {method}, which weighs inputs by text: no blocks were given")

    def split(self, num_tokens: int) -> tuple[Calibration, Calibration | None]:
        """The batches to take statistics from, and the last ones, of `num_tokens` tokens at least, to probe on: on what
        the statistics are fitted to, a truncation looks better than it is. None for no tokens."""
        count = 0
        while sum(batch.tokens.numel() for batch in self.batches[len(self.batches) - count :]) < num_tokens:
            count += 1
            if count >= len(self.batches):
                raise UsageError(f"compress.probe_tokens is {num_tokens}: no blocks are left to take statistics from")
        first = len(self.batches) - count
        return self._with(self.batches[:first]), self._with(self.batches[first:]) if count else None

    def first(self, num_tokens: int) -> Calibration:
        """The first batches, of `num_tokens` tokens at least, or all of them."""
        counts = itertools.accumulate((batch.tokens.numel() for batch in self.batches), initial=0)
        few = [batch for batch, before in zip(self.batches, counts, strict=False) if before < num_tokens]
        return self._with(few)

    def moments(self, curvature: bool = False) -> dict[MLP, statistics.Moments]:
        """What is seen around each MLP. Too large to be kept: the caller takes it over.

        Raises `UsageError` for fewer tokens than the hidden size has dimensions.
        """
        self.require_tokens(self.model.config.get_text_config().hidden_size)
        return statistics.collect(
            self.model,
            self._tokens,
            curvature=curvature,
            seed=self.seed,
            device=self.device,
            separator=self.separator,
        )

    def output_curvature(self, num_tokens: int) -> dict[MLP, statistics.Gram]:
        """The curvature of the KL at the output of each MLP, from about `num_tokens` tokens; the caller takes it over.

        Raises `UsageError` for fewer tokens than the MLPs have neurons.
        """
        self.require_tokens(max(shape(self.model.get_submodule(mlp.output))[0] for mlp in find_mlps(self.model)))
        few = self.first(num_tokens)._tokens
        return statistics.output_curvature(
            self.model, few, seed=self.seed, device=self.device, separator=self.separator
        )

    def weight_gradients(self) -> dict[str, Float[Tensor, "_ _"]]:
        """The gradient of each MLP weight, output x input, by the matrix's name, of the cross-entropy of the text. Too
        large to be kept: the caller takes it over."""
        return gradients.weight_gradients(self.model, self._tokens, device=self.device, separator=self.separator)

    def walk(self) -> Walk:
        """The text, before the first layer."""
        return Walk(self.model, self._tokens, self.device, self.separator)

    @functools.cached_property
    def input_norms(self) -> dict[str, Float[Tensor, " F"]]:
        """The norm of every input of each MLP matrix over all tokens, by the matrix's name."""
        return statistics.input_norms(self.model, self._tokens, device=self.device, separator=self.separator)

    def probe(self) -> Probe:
        """The true KL of a change of the model, on all of the text."""
        return Probe(self.model, [(batch.ids, batch.tokens) for batch in self.batches], self.teacher, self.separator)

    def require_tokens(self, dimensions: int) -> None:
        """Raises `UsageError` for fewer tokens than `dimensions` of a second moment; warns of few."""
        enough = statistics.TOKENS_PER_DIMENSION * dimensions  # below it the statistics are fitted to the sample
        found = f"statistics of {dimensions} dimensions from {self.num_tokens} tokens"
        if self.num_tokens < dimensions:
            raise UsageError(f"{found}: expected at least {dimensions}, better {enough}")
        if self.num_tokens < enough:
            self.warn(f"{found}: at least {enough} are advised")

    @property
    def _tokens(self) -> list[Tensor]:
        return [batch.tokens for batch in self.batches]

    def _with(self, batches: Sequence[Batch]) -> Calibration:
        return Calibration(
            self.model,
            batches,
            seed=self.seed,
            device=self.device,
            separator=self.separator,
            teacher=self.teacher,
            warn=self.warn,
        )


def batches_of(blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None, batch_size: int) -> list[Batch]:
    """Blocks that a library user gives, as one tensor or as batches, numbered in their order."""
    if blocks is None:
        return []
    found, first = [], 0
    for tokens in blocks.split(batch_size) if isinstance(blocks, Tensor) else blocks:
        found.append(Batch(range(first, first + len(tokens)), tokens))
        first += len(tokens)
    return found
