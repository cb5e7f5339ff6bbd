"""The neurons of an MLP: rows of the matrices that write them (of both halves, where gate and up are one matrix),
columns of the one that reads them. Where nothing else tells them apart they can be put in any order, or left out.

Shape letters: I input features, K chosen neurons, O output features.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.errors import UsageError
from sparsekd.models.anatomy import MLP, find_mlps, is_linear, linear_weight, shape


def parent_name(mlp: MLP) -> str:
    """The module that holds the matrices of an MLP."""
    return mlp.output.rpartition(".")[0]


def num_neurons(model: PreTrainedModel, mlp: MLP) -> int:
    """How wide the MLP's hidden layer is."""
    return shape(model.get_submodule(mlp.output))[0]


def rows_of(chosen: Int[Tensor, " K"], neurons: int, out_features: int) -> Int[Tensor, " _"]:
    """The rows that write the chosen ones of `neurons` neurons: in a fused matrix those of both halves."""
    return torch.cat([chosen + start for start in range(0, out_features, neurons)])


def require_alike(model: PreTrainedModel, needed_for: str) -> None:
    """Raises `UsageError`, which says that `needed_for` cannot be used, where something beside the linear layers tells
    the neurons of an MLP apart."""
    mlps = find_mlps(model)
    for mlp in mlps:
        parent, neurons = model.get_submodule(parent_name(mlp)), num_neurons(model, mlp)
        others = [p for child in parent.children() if not is_linear(child) for p in child.parameters()]
        if neurons != shape(model.get_submodule(mlp.output))[1] and any(p.shape == (neurons,) for p in others):
            raise _told_apart(mlp, "has a parameter for each neuron", needed_for)
    if any(hasattr(module, "factors") for module in model.modules()):
        return  # it was found before
    fused = next((mlp for mlp in mlps if _is_fused(model, mlp)), None)
    if fused is not None and not _halves_are_gate_and_up(model, fused):
        raise _told_apart(fused, "does not read its fused matrix as two halves", needed_for)


def _told_apart(mlp: MLP, why: str, needed_for: str) -> UsageError:
    return UsageError(f"{parent_name(mlp)} {why}: {needed_for} cannot be used, lowrank can")


def _is_fused(model: PreTrainedModel, mlp: MLP) -> bool:
    return shape(model.get_submodule(mlp.inputs[0]))[1] == 2 * num_neurons(model, mlp)


@torch.no_grad()
def _halves_are_gate_and_up(model: PreTrainedModel, mlp: MLP) -> bool:
    """Whether a copy of the MLP whose neurons are all moved by one computes the same."""
    parent: nn.Module = model.get_submodule(parent_name(mlp))
    moved = copy.deepcopy(parent)
    fused, output = (moved.get_submodule(name.rpartition(".")[2]) for name in mlp.matrices)
    neurons = shape(output)[0]
    order = torch.arange(neurons, device=model.device).roll(1)
    rows = rows_of(order, neurons, shape(fused)[1])
    linear_weight(fused).copy_(linear_weight(fused)[rows])
    linear_weight(output).copy_(linear_weight(output)[:, order])
    if isinstance(fused.bias, Tensor):
        fused.bias.copy_(fused.bias[rows])
    x = torch.randn(16, shape(fused)[0], generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    expected = parent(x)
    return bool(torch.allclose(moved(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())))
