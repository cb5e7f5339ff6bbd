"""Zeros instead of low rank: the plan and the cut of the methods of form `mask`.

A weight is compared with the others of its own output row, so every output loses the same share of its inputs. The
result is the dense model with zeros in it: nothing that runs it is faster or smaller for them.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.plan import MatrixPlan, Plan, require_form
from sparsekd.errors import UsageError
from sparsekd.models import find_mlps, forms, linear_weight, num_parameters, shape


def uniform(model: PreTrainedModel, reduction: float, method: str) -> Plan:
    """The same share of zeros in every row of every matrix, a row's bias counted as one of its parameters.

    Works on a model without weights too. Raises `UsageError` for a model of another form, and for a masked one
    that has as many zeros already.
    """
    require_form(model, ("mask",), method)
    described = forms.description_of(model)
    matrices = []
    for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
        module = model.get_submodule(name)
        inputs, outputs = shape(module)
        before = num_parameters(module)
        # the small term keeps a share that is a whole number from becoming one more by rounding
        zeros = outputs * math.ceil(reduction * before / outputs - 1e-9)
        rank = min(inputs, outputs)
        matrices.append(MatrixPlan(name, inputs, outputs, None, rank, before, before - zeros, zeros=zeros))
    made = Plan(matrices, num_parameters(model), reduction)
    zeros_now = 0 if described is None else sum(layer["zeros"] for layer in described.layers.values())
    pruned = zeros_now / made.mlp_parameters_before
    if reduction <= pruned:
        raise UsageError(
            f"reduction is {reduction:g}, but {pruned:.1%} of the MLP parameters are zero already: expected more"
        )
    return made


@torch.no_grad()
def prune(model: PreTrainedModel, planned: Plan, scores: Callable[[Tensor, str], Tensor]) -> None:
    """Sets the weights of the lowest `scores` to zero, in place, as many of each row as `planned`."""
    for matrix in planned.matrices:
        weight = linear_weight(model.get_submodule(matrix.name))
        least = least_important(weight, scores(weight, matrix.name), matrix.zeros // matrix.out_features)
        weight.masked_fill_(least, 0)


def least_important(weight: Float[Tensor, "O I"], scores: Float[Tensor, "O I"], num_zeros: int) -> Bool[Tensor, "O I"]:
    """True at the `num_zeros` lowest scores of each row; of equal ones, zeros and then the first."""
    ranked = scores.masked_fill(weight == 0, -1)  # before a weight of no importance: pruned twice is not two zeros
    lowest = ranked.sort(dim=1, stable=True).indices[:, :num_zeros]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)
