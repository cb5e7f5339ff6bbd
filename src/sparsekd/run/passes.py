"""Passes of models that are split over processes: all take part in each, also those that have no use for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekd.run.processes import Processes


class Passes:
    """The passes of models that all processes know by number, so that each may run them as often as it needs: one that
    begins a pass asks for it, and the others run a token through the same model.

    `model_of` a number is asked for a model when it is first to take part in a pass of it.
    """

    def __init__(self, processes: Processes, model_of: Callable[[int], PreTrainedModel]):
        self._processes, self._model_of = processes, model_of
        self._takes_part = False

    def announce(self, number: int, model: PreTrainedModel) -> None:
        """Has every pass of the model wait until it is the one that all run."""

        def before(*_: Any) -> None:
            while not self._takes_part and (granted := self._processes.turn(number)) != number:
                assert granted is not None, "this process wants one"
                self._take_part(granted)

        model.register_forward_pre_hook(before, prepend=True)

    def join(self) -> None:
        """Takes part in the others' passes until none wants another one."""
        while (number := self._processes.turn(None)) is not None:
            self._take_part(number)

    @torch.inference_mode()
    def _take_part(self, number: int) -> None:
        model = self._model_of(number)
        self._takes_part = True
        try:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        finally:
            self._takes_part = False
