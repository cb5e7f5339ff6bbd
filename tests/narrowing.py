"""Neurons removed by their numbers, the others kept as they are: a method of form `width` without a choice."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.models import MLP, find_mlps, forms, linear_weight, shape
from sparsekd.models.forms import width


def chosen(model: PreTrainedModel, *widths: int, seed: int = 0) -> dict[MLP, Tensor]:
    """Random neurons of each MLP, ascending; one width for all of them, or one for each."""
    generator, mlps = torch.Generator().manual_seed(seed), find_mlps(model)
    all_widths: Sequence[int] = widths * len(mlps) if len(widths) == 1 else widths
    return {
        mlp: torch.randperm(shape(model.get_submodule(mlp.output))[0], generator=generator)[:count].sort().values
        for mlp, count in zip(mlps, all_widths, strict=True)
    }


def without(model: PreTrainedModel, kept: dict[MLP, Tensor]) -> PreTrainedModel:
    """A copy in which the other neurons have no effect: their columns of the output matrix are zero."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for mlp, neurons in kept.items():
            weight = linear_weight(reference.get_submodule(mlp.output))
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[neurons] = False
            weight[:, gone] = 0
    return reference


def narrow(model: Any, kept: dict[MLP, Tensor], reduction: float = 0.5) -> None:
    """Keeps these neurons alone, and says so in the config."""
    dense = forms.dense_sizes(model)
    outputs = {mlp: linear_weight(model.get_submodule(mlp.output))[:, neurons] for mlp, neurons in kept.items()}
    width.keep(model, kept, outputs, {})
    forms.mark(model, "width", "by-hand", reduction, dense)
