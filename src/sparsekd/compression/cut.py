"""The structural step: a method's plan and choice, and what the config says of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.calibration import Calibration, batches_of
from sparsekd.compression.methods import method_named
from sparsekd.compression.plan import Plan, combined
from sparsekd.errors import DataError, UsageError
from sparsekd.models import forms, in_float32, linear_weight, twin
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
    parameters to remove) and `method`, and those of the method's own section, such as `allocation` and `format`;
    `first` has the sections of steps before it. A compressed model is compressed further, by one step. Raises
    `UsageError` for a value out of range or a model without an MLP, `DataError` for weights or activations that are not
    finite or too few tokens; the model is then unchanged, but for what earlier steps did.
    """
    section = compress_section(options)
    batches = batches_of(blocks, section.batch_size)
    apply(model, lambda step: Calibration(model, batches, seed=seed), section)
    return model


def plan_for(model: PreTrainedModel, section: Compress) -> Plan:
    """What the shapes alone decide: uniform ranks, or zeros. Works on a model without weights too."""
    *earlier, last = section.steps
    if not earlier:
        return _planned(model, last)
    _require_dense(model)
    shaped, plans = twin(model), []
    for step in earlier:
        plans.append(_planned(shaped, step))
        form: Any = forms.form_named(method_named(step.method).FORM)
        form.take_shape(shaped, plans[-1])
    plans.append(_planned(shaped, last))
    return combined(plans, section.total)


def apply(model: PreTrainedModel, calibration_for: Callable[[Compress], Calibration], section: Compress) -> Plan:
    """What `compress` does, with the text that each step asks for, returning the plan with the damage that was
    predicted and measured for each matrix. Of several steps, what the earlier ones did stays where a later one fails.
    """
    dense, steps = forms.dense_sizes(model), section.steps
    if len(steps) > 1:
        _require_dense(model)
    plans = []
    with in_float32(model):  # what is solved from rounded numbers is rounded twice
        for step in steps:
            method, planned = method_named(step.method), _planned(model, step)
            _check_weights(model, planned)
            plans.append(method.apply(model, planned, calibration_for(step), step.options))
        form = "+".join(method_named(step.method).FORM for step in steps)
        forms.mark(model, form, section.methods, section.total, dense)
    return combined(plans, section.total)


def _planned(model: PreTrainedModel, step: Compress) -> Plan:
    return method_named(step.method).plan(model, step.reduction, step.options)


def _require_dense(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a model that something was removed from: of several steps each takes its share."""
    described = forms.description_of(model)
    if described is not None:
        raise UsageError(f"compress has several steps, and the model is {described.form} already: give the dense model")


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
