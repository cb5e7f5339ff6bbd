"""Copies of a model that share its weights: to say something else of them, or in another number format."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def twin(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy that has the parameters of `model` for its own; with `dtype`, copies of those that are of another one.
    Config and modules are copies, so that either may be changed."""
    shared = {id(one): one for one in model.parameters()}
    if dtype is not None:
        shared = {key: one if one.dtype == dtype else _cast(one, dtype) for key, one in shared.items()}
    return copy.deepcopy(model, shared)


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
