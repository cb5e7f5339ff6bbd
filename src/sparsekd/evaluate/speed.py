"""How fast models read a prompt and go on from it, side by side.

Measured in turns, so that what else the machine does falls on all of them; a ratio of two is what to quote.

Shape letters: B prompts, L tokens of each.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.errors import UsageError
from sparsekd.records import Record

R = TypeVar("R")

BLOCKS, LENGTH = 4, 128  # of a pass
_PASSES = 7  # of each model, after one that is not counted
_DIFFERENT = 50  # tokens of a prompt: any vocabulary has so many


@runtime_checkable
class Session(Protocol):
    """A model as a server runs it. Both calls return when the next tokens are known, the likeliest ones."""

    def prefill(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        """Reads prompts, all anew: keeps the cache, and computes logits for the last position only."""
        ...

    def decode(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """One more token of each, from the cache."""
        ...


class Serving:
    """A `Session` in PyTorch; raises `UsageError` when a model that has no cache should go on."""

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any] | None = None):
        """`run` computes what the model does; None: the model itself."""
        self._run, self._device, self._cache = model if run is None else run, model.device, None
        # what knows it not computes all logits
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    @property
    def has_cache(self) -> bool:
        """Whether the model has read something and kept a cache of it."""
        return self._cache is not None

    def prefill(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        self._cache = self._new_cache(tokens)
        return self._step(tokens)

    def decode(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        if self._cache is None:
            raise UsageError("a model without a cache of keys and values reads everything again for each token")
        return self._step(tokens[:, None])

    def _new_cache(self, tokens: Int[Tensor, "B L"]) -> Any:
        """None: the model makes its own."""
        return None

    @torch.inference_mode()
    def _step(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        earlier = {} if self._cache is None else {"past_key_values": self._cache}
        found = self._run(input_ids=tokens.to(self._device), use_cache=True, **earlier, **self._last)
        self._cache = getattr(found, "past_key_values", None)
        return found.logits[:, -1].argmax(-1).cpu()


def prompt(batch: int, length: int) -> Int[Tensor, "B L"]:
    """Tokens to read; which ones they are costs nothing."""
    return torch.arange(batch * length).reshape(batch, length) % _DIFFERENT


def timed(call: Callable[[], R]) -> tuple[float, R]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def prefill(models: dict[str, PreTrainedModel]) -> Record:
    """Seconds until the first new token of `BLOCKS` prompts of `LENGTH` tokens is known, the median of seven, by the
    name of the model."""
    tokens = prompt(BLOCKS, LENGTH)
    sessions = {name: Serving(model) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(1 + _PASSES):
        for name, session in sessions.items():
            seconds, _ = timed(lambda session=session: session.prefill(tokens))
            if number:
                taken[name].append(seconds)
    return {"blocks": BLOCKS, "length": LENGTH, "seconds": {name: statistics.median(t) for name, t in taken.items()}}
