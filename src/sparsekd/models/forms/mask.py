"""Form `mask`: zeros in dense matrices. The model keeps its class and its size; the config says how many zeros each
matrix has, and loading, saving and training hold it to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsekd.errors import DataError
from sparsekd.models.anatomy import find_mlps, linear_weight
from sparsekd.models.forms._description import Description, Layers, description_of


def layers(model: PreTrainedModel) -> Layers:
    """What config.json says of each matrix with zeros: how many."""
    counted = {name: num_zeros(model, name) for mlp in find_mlps(model) for name in mlp.matrices}
    return {name: {"zeros": zeros} for name, zeros in counted.items() if zeros}


def num_zeros(model: PreTrainedModel, name: str) -> int:
    """The zeros in a matrix of the model."""
    return int((linear_weight(model.get_submodule(name)) == 0).sum())


def base_opens(model: PreTrainedModel) -> tuple[bool, dict[str, Any]]:
    """The base's own class, as it is."""
    return True, {}


def ordinary(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """All is ordinary."""
    return {}, {}


def is_described(layer: Mapping[str, Any]) -> bool:
    """Whether config.json says of a matrix what it has to."""
    return type(layer.get("zeros")) is int and layer["zeros"] > 0


def check(model: PreTrainedModel, layers: Layers) -> None:
    """Raises `DataError` naming the first matrix that has fewer zeros than pruning left in it."""
    matrices = {name for mlp in find_mlps(model) for name in mlp.matrices}
    for name, layer in layers.items():
        if name not in matrices:
            raise DataError(f"config.json gives zeros to {name}, which is no matrix of an MLP")
        found = num_zeros(model, name)
        if found < layer["zeros"]:
            raise DataError(
                f"{name} has {found} zeros, pruning left {layer['zeros']}: other training filled them; sparsekd "
                "distill keeps them, and without `sparsekd` in config.json the model is a dense one"
            )


def trained(model: PreTrainedModel) -> set[str]:
    """The matrices that `distill.train: compressed` means."""
    description = description_of(model)
    assert description is not None
    return {name for name, layer in description.layers.items() if is_described(layer)}


def guard(model: PreTrainedModel) -> Zeros:
    """Keeps the zeros."""
    return Zeros(model)


def describe(description: Description) -> dict[str, str]:
    """Facts for `inspect`."""
    zeros = sum(layer["zeros"] for layer in description.layers.values())
    return {"compressed": f"{description.method}, {zeros} zeros in dense matrices", "format": "mask"}


def from_earlier(model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
    """The layers of a description that version 1 wrote."""
    return {name: {"zeros": zeros} for name, zeros in description["zeros"].items()}


class Zeros:
    """The zeros of a masked model's matrices, taken now and kept through training.

    Without a gradient from the first step on, they have no part in clipping and Adam's moments stay zero; setting them
    back after a step is for moments that are not. Made after accelerate has put the parameters where they train.
    """

    @torch.no_grad()
    def __init__(self, student: PreTrainedModel):
        weights: list[Any] = [student.get_submodule(name).weight for name in trained(student)]
        self._masks = [(weight, weight == 0) for weight in weights]

    def drop_gradients(self) -> None:
        """Before clipping."""
        for weight, mask in self._masks:
            weight.grad.masked_fill_(mask, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """After the optimizer's step."""
        for weight, mask in self._masks:
            weight.masked_fill_(mask, 0)
