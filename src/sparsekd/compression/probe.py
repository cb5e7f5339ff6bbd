"""The true damage of truncating one matrix: KL to the teacher with only that matrix changed.

Curvature predicts this from one backward pass; the probe measures it. The layers before the matrix compute what they
always did, so their output is recorded once and every measurement starts at the matrix's own layer.

Shape letters: B blocks, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.distillation import kd_loss
from sparsekd.models import Layers, document_inputs, logits_of, replace_module
from sparsekd.models.forms import lowrank
from sparsekd.teacher import Samples, Targets, distributions


@runtime_checkable
class Teacher(Protocol):
    """Whoever knows the distributions of a block, such as a `Cache`."""

    def read(self, block_id: int, tokens: np.ndarray) -> Targets | Samples: ...


class Probe:
    """KL to the teacher's distributions on some blocks, in nats a position, while `model` stays what it is."""

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[tuple[Sequence[int], Int[Tensor, "_ _"]]],
        teacher: Teacher | None = None,
        separator: int | None = None,
    ):
        """`batches` are block ids with their tokens. `teacher` gives a block's targets, row t for token t + 1; None:
        the model's own distributions as it is. With a `separator`, the token that ends a document, packed documents do
        not see each other."""
        self._model, self._layers = model, Layers(model)
        self._batches = []
        for ids, batch in batches:
            inputs = document_inputs(batch.to(model.device), separator)
            hidden = self._layers.record(lambda inputs=inputs: model.get_decoder()(**inputs, use_cache=False))
            if teacher is None:
                rows = distributions(model, batch, top_k=32, separator=separator)
            else:
                rows = [teacher.read(i, block.numpy().astype(np.int32)) for i, block in zip(ids, batch, strict=True)]
            self._batches.append((inputs, hidden, [Targets(*(c.to(model.device) for c in row)) for row in rows]))
        self._numbers = {
            id(module): number for number, layer in enumerate(self._layers.modules) for module in layer.modules()
        }

    def of_one(self, name: str, factors: lowrank.Factors) -> float:
        """The KL with the matrix `name` replaced by `up @ down`; it is put back afterwards."""
        module = self._model.get_submodule(name)
        layer = lowrank.make_layer("two-factors", *factors, getattr(module, "bias", None))
        replace_module(self._model, name, layer)
        try:
            return self._kl(self._numbers[id(module)])
        finally:
            replace_module(self._model, name, module)

    def of_all(self) -> float:
        """The KL of the model as it is now."""
        return self._kl(0)

    @torch.inference_mode()
    def _kl(self, first: int) -> float:
        total, count = 0.0, 0
        for inputs, hidden, targets in self._batches:
            logits, _ = self._layers.run(lambda inputs=inputs: logits_of(self._model, **inputs), hidden[first], first)
            for row, part in enumerate(targets):
                loss = kd_loss(
                    logits[row, :-1], inputs["input_ids"][row, 1:], part, alpha=1.0, temperature=1.0, denominator=1
                )
                total, count = total + loss.kd.item(), count + len(part.log_tail)
        return total / count
