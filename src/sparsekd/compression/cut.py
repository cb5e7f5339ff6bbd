"""The structural step: a method's plan and choice, and what the config says of the result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.calibration import Calibration, batches_of
from sparsekd.compression.methods import method_named
from sparsekd.compression.plan import Plan
from sparsekd.errors import DataError
from sparsekd.models import forms, in_float32, linear_weight
from sparsekd.recipe import Compress, compress_section


def compress(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None = None,
    *,
    seed: int = 42,
    **options: Any,
) -> PreTrainedModel:
    """Makes the MLPs of `model` smaller, in place, and returns it: low-rank by default; with `method="wanda"` the same
    model with zeros in them.

    `blocks` are token ids to take the statistics from, as one tensor or as batches; `svd` needs none. `options` are
    the fields of the recipe's `compress` section, such as `reduction` (the fraction of the dense model's MLP
    parameters to remove) and `method`, and those of the method's own section, such as `allocation` and `format`. A
    compressed model is compressed further. Raises `UsageError` for a value out of range or a model without an MLP,
    `DataError` for weights or activations that are not finite or too few tokens; the model is then unchanged.
    """
    section = compress_section(options)
    apply(model, Calibration(model, batches_of(blocks, section.batch_size), seed=seed), section)
    return model


def plan_for(model: PreTrainedModel, section: Compress) -> Plan:
    """What the shapes alone decide: uniform ranks, or zeros. Works on a model without weights too."""
    return method_named(section.method).plan(model, section.reduction, section.options)


def apply(model: PreTrainedModel, calibration: Calibration, section: Compress) -> Plan:
    """What `compress` does, returning the plan with the damage that was predicted and measured for each matrix."""
    method = method_named(section.method)
    planned, dense = plan_for(model, section), forms.dense_sizes(model)
    _check_weights(model, planned)
    with in_float32(model):  # what is solved from rounded numbers is rounded twice
        done = method.apply(model, planned, calibration, section.options)
        forms.mark(model, method.FORM, section.method, section.reduction, dense)
    return done


def _check_weights(model: PreTrainedModel, planned: Plan) -> None:
    """Raises `DataError` for a matrix that is no matrix of finite floating point numbers."""
    for matrix in planned.matrices:
        weight = linear_weight(model.get_submodule(matrix.name))
        if weight.shape != (matrix.out_features, matrix.in_features) or not weight.is_floating_point():
            raise DataError(
                f"the weight of {matrix.name} is {tuple(weight.shape)} {weight.dtype}: expected floating point numbers "
                f"of shape {(matrix.out_features, matrix.in_features)}; a quantised model cannot be compressed"
            )
        if not torch.isfinite(weight).all():
            raise DataError(f"the weight of {matrix.name} is not finite: the model is damaged")
