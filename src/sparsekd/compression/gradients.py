"""The gradient of every MLP weight, summed over the text, of cross-entropy with the text's own next tokens.

The backward pass goes a layer at a time, as that of the curvature does, and reads a weight's gradient off what its
layer reads and what the loss sends back to it. The sums are float32, as those of a training.

Shape letters: N tokens, O output features, I input features, L positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.compression.statistics import place, run_all
from sparsekd.device import add_over_processes, rounded_factors
from sparsekd.models import MLP, find_mlps, shape

_IGNORED = -100  # a label that cross-entropy leaves out


class WeightGradient:
    """Running sum of the gradient of a layer's weight."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.sum: Float[Tensor, "O I"] = torch.zeros(out_features, in_features, device=device)

    def add(self, x: Float[Tensor, "N I"], gradient: Float[Tensor, "N O"]) -> None:
        with torch.autocast(x.device.type, enabled=False), rounded_factors():
            self.sum += (gradient.float().T @ x.float()).to(self.sum.device)

    def is_finite(self) -> Tensor:
        return torch.isfinite(self.sum).all()

    def add_processes(self) -> None:
        """Makes the sum that of all processes."""
        add_over_processes(self.sum)


def weight_gradients(
    model: PreTrainedModel,
    batches: Iterable[Int[Tensor, "_ _"]],
    *,
    device: torch.device | None = None,
    separator: int | None = None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """The gradient of each MLP weight, output x input, by the name of the matrix, of the sum of the losses of all
    tokens. All else as in `statistics.collect`; with a `separator` no document's first token counts."""
    found: dict[MLP, list[WeightGradient]] = {}
    handles = []
    for mlp in find_mlps(model):
        found[mlp] = []
        for module in map(model.get_submodule, mlp.matrices):
            inputs, outputs = shape(module)
            found[mlp].append(WeightGradient(outputs, inputs, place(model, device)))
            handles.append(module.register_forward_hook(_reads(found[mlp][-1])))
    try:
        run_all(
            model, batches, found, device, separator, lambda *_: functools.partial(next_tokens, separator=separator)
        )
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: gradient.sum for mlp, of_mlp in found.items() for name, gradient in zip(mlp.matrices, of_mlp, strict=True)
    }


def next_tokens(
    logits: Float[Tensor, "L V"], tokens: Int[Tensor, " L"], separator: int | None = None
) -> Int[Tensor, " L"]:
    """The token that follows each position; none at the last one, nor where a document ends."""
    following = F.pad(tokens[1:], (0, 1), value=_IGNORED)
    return following if separator is None else following.masked_fill(tokens == separator, _IGNORED)


def _reads(gradient: WeightGradient) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda sent: gradient.add(x, sent.flatten(0, -2)))

    return hook
