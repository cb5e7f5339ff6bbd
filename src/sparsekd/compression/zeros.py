"""Zeros instead of low rank: the plan of the methods of form `mask`, and the cut by scores.

A weight is compared with the others of its group: its output row, its whole matrix, or with pattern N:M the M
neighbouring inputs of one output, of which N become zero. The result is the dense model with zeros in it: nothing that
runs it is faster or smaller for them, unless it has kernels for the pattern.

Shape letters: O output features, I input features, G groups, M weights of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.plan import MatrixPlan, Plan, require_form
from sparsekd.errors import UsageError
from sparsekd.models import find_mlps, forms, linear_weight, num_parameters, shape
from sparsekd.models.forms import mask


def zeros_and_group(pattern: str) -> tuple[int, int] | None:
    """N and M of a pattern N:M; None for `unstructured`."""
    zeros, colon, group = pattern.partition(":")
    return (int(zeros), int(group)) if colon else None


def plan_of(model: PreTrainedModel, reduction: float, method: str, pattern: str, by_row: bool) -> Plan:
    """The same share of zeros in every matrix, and `by_row` in every row of it, its biases counted as parameters; with
    a pattern N:M that of the pattern.

    Works on a model without weights too. Raises `UsageError` for a model of another form, for a masked one that has
    as many zeros already, and for a reduction or a matrix that the pattern does not fit.
    """
    require_form(model, ("mask",), method)
    described = forms.description_of(model)
    structured = zeros_and_group(pattern)
    if structured is not None and not math.isclose(reduction, structured[0] / structured[1]):
        raise UsageError(
            f"reduction is {reduction:g}, but pattern {pattern} removes {structured[0]} of every {structured[1]} "
            f"weights: expected {structured[0] / structured[1]:g}"
        )
    matrices = []
    for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
        module = model.get_submodule(name)
        inputs, outputs = shape(module)
        before = num_parameters(module)
        if structured is None:
            parts = outputs if by_row else 1
            # the small term keeps a share that is a whole number from becoming one more by rounding
            zeros = parts * math.ceil(reduction * before / parts - 1e-9)
        else:
            zeros = _in_pattern(name, inputs, structured) * outputs
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


def _in_pattern(name: str, inputs: int, structured: tuple[int, int]) -> int:
    """Zeros of one output."""
    zeros, group = structured
    if inputs % group:
        raise UsageError(
            f"{name} has {inputs} inputs, which pattern {zeros}:{group} cannot divide: expected a multiple of {group}; "
            "take pattern unstructured"
        )
    return inputs // group * zeros


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    planned: Plan,
    scores: Callable[[Tensor, str], Tensor],
    pattern: str,
    by_row: bool,
) -> Plan:
    """Sets the weights of the lowest `scores` to zero, in place, as many of each group as `planned`. Returns the plan
    with the zeros that are there then: a matrix that had more of them in a group keeps them."""
    structured = zeros_and_group(pattern)
    for matrix in planned.matrices:
        weight = linear_weight(model.get_submodule(matrix.name))
        size = structured[1] if structured else matrix.in_features if by_row else weight.numel()
        found = scores(weight, matrix.name).reshape(-1, size)
        least = least_important(weight.reshape(-1, size), found, matrix.zeros * size // weight.numel())
        weight.masked_fill_(least.view(weight.shape), 0)
    return counted(model, planned)


def counted(model: PreTrainedModel, planned: Plan) -> Plan:
    """The plan with the zeros that the matrices have."""
    found = [(matrix, mask.num_zeros(model, matrix.name)) for matrix in planned.matrices]
    lines = [replace(m, zeros=zeros, parameters_after=m.parameters_before - zeros) for m, zeros in found]
    return replace(planned, matrices=lines)


def least_important(weight: Float[Tensor, "G M"], scores: Float[Tensor, "G M"], num_zeros: int) -> Bool[Tensor, "G M"]:
    """True at the `num_zeros` lowest scores of each group; of equal ones, zeros and then the first."""
    ranked = scores.masked_fill(weight == 0, -1)  # before a weight of no importance: pruned twice is not two zeros
    lowest = ranked.sort(dim=1, stable=True).indices[:, :num_zeros]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)
