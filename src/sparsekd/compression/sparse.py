"""Unstructured pruning: zeros instead of low rank, the control that the paper calls WANDA.

A weight counts by what it does on the calibration text, `|W_ij| ||x_j||_2` (Wanda, Sun et al., arXiv 2306.11695), and
is compared with the others of its own output row, so every output loses the same share of its inputs. The result is
the dense model with zeros in it: nothing that runs it is faster or smaller for them.

Shape letters: O output features, I input features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import statistics
from sparsekd.compression.ranks import MatrixPlan, Plan
from sparsekd.errors import UsageError
from sparsekd.models import CompressedLinear, find_mlps, linear_weight, num_parameters, pruned_zeros, shape
from sparsekd.recipe import Compress


def plan(model: PreTrainedModel, options: Compress) -> Plan:
    """The same share of zeros in every row of every matrix, a row's bias counted as one of its parameters.

    Works on a model without weights too. Raises `UsageError` for a low-rank model, and for a masked one that has as
    many zeros already.
    """
    matrices = []
    for name in (name for mlp in find_mlps(model) for name in mlp.matrices):
        module = model.get_submodule(name)
        if isinstance(module, CompressedLinear):
            raise UsageError(f"compress.method is wanda, but {name} is low-rank already: prune the dense model instead")
        inputs, outputs = shape(module)
        before = num_parameters(module)
        # the small term keeps a share that is a whole number from becoming one more by rounding
        zeros = outputs * math.ceil(options.reduction * before / outputs - 1e-9)
        rank = min(inputs, outputs)
        matrices.append(MatrixPlan(name, inputs, outputs, None, rank, before, before - zeros, zeros=zeros))
    made = Plan(matrices, num_parameters(model))
    pruned = sum(pruned_zeros(model).values()) / made.mlp_parameters_before
    if options.reduction <= pruned:
        raise UsageError(
            f"reduction is {options.reduction:g}, but {pruned:.1%} of the MLP parameters are zero already: "
            "expected more"
        )
    return made


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    planned: Plan,
    batches: Iterable[Int[Tensor, "_ _"]],
    options: Compress,
    *,
    device: torch.device | None = None,
    separator: int | None = None,
) -> None:
    """Sets the weights that matter least to zero, in place, as many as `planned`; `config.sparsekd` says how many.

    Raises `UsageError` without text, `DataError` for activations that are not finite; the model is then unchanged.
    """
    batches = list(batches)
    if not batches:
        raise UsageError("compress.method is wanda, which weighs inputs by text: no blocks were given")
    norms = statistics.input_norms(model, batches, device=device, separator=separator)
    for matrix in planned.matrices:
        weight = linear_weight(model.get_submodule(matrix.name))
        least = least_important(weight, norms[matrix.name], matrix.zeros // matrix.out_features)
        weight.masked_fill_(least, 0)
    zeros = {matrix.name: matrix.zeros for matrix in planned.matrices}
    description = {"format": options.format, "method": options.method, "allocation": options.allocation}
    model.config.sparsekd = description | {"reduction": options.reduction, "zeros": zeros}  # type: ignore[attr-defined]


def least_important(weight: Float[Tensor, "O I"], norms: Float[Tensor, " I"], num_zeros: int) -> Bool[Tensor, "O I"]:
    """True at the `num_zeros` lowest of `|W_ij| ||x_j||_2` in each row; of equal ones, zeros and then the first."""
    scores = weight.float().abs() * norms.float().to(weight.device)
    scores.masked_fill_(weight == 0, -1)  # before a weight whose input is always zero: pruned twice is not two zeros
    lowest = scores.sort(dim=1, stable=True).indices[:, :num_zeros]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)
