"""The number format of a model's weights, changed for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """The model's parameters in float32 while something is solved from them or trains them, in place; afterwards each
    is in the number format that it came in, and what took a parameter's place in the model's."""
    came_in, usual = {name: parameter.dtype for name, parameter in model.named_parameters()}, model.dtype
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.dtype != came_in.get(name, usual):
                parameter.data = parameter.data.to(came_in.get(name, usual))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What `nn.Module.to` does, for what is saved only: buffers that are not, as rotary frequencies, stay exact, as
    they are when the model is loaded."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
