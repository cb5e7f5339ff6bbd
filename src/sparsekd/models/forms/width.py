"""Form `width`: MLPs with fewer neurons, so smaller matrices of the ordinary kind.

Where all MLPs have one width the base's own class opens the model, by the width in its config; where they differ, or
the base has no key for it, a class of ours makes the layers again (`_layers.py`).

Shape letters: H hidden size, I input features, K kept neurons, O output features.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.errors import DataError, UsageError
from sparsekd.models.anatomy import MLP, find_mlps, linear_weight, replace_module
from sparsekd.models.forms._classes import base_class
from sparsekd.models.forms._description import Description, Layers, description_of
from sparsekd.models.forms._layers import resized
from sparsekd.models.forms._neurons import num_neurons, parent_name, require_alike, rows_of

_WIDTH_KEY = re.compile(r"inner|intermediate|ffn|feed_forward|d_ff")  # what configs call the width of an MLP
_MULTIPLE = 32  # of a width that matrix products are quick with


# ---- the form


def layers(model: PreTrainedModel) -> Layers:
    """What config.json says of each MLP, by the module that holds its matrices, of which the last one is the output:
    the neurons left, and those of the dense model."""
    return {
        parent_name(mlp): {
            "neurons": num_neurons(model, mlp),
            "dense": dense_neurons(model, mlp),
            "matrices": [name.rpartition(".")[2] for name in mlp.matrices],
        }
        for mlp in find_mlps(model)
    }


def dense_neurons(model: PreTrainedModel, mlp: MLP) -> int:
    """The neurons that an MLP had before any was removed."""
    name, described = parent_name(mlp), description_of(model)
    known = None if described is None else described.layers.get(name, {}).get("dense")
    return getattr(model.get_submodule(name), "dense_neurons", known or num_neurons(model, mlp))


def base_opens(model: PreTrainedModel) -> tuple[bool, dict[str, Any]]:
    """The base's class opens a model of one width if its config has a key for it. The config of a class of ours has the
    dense width there."""
    described = layers(model).values()
    left, dense = {one["neurons"] for one in described}, {one["dense"] for one in described}
    one_width = _settings(model, next(iter(left))) if len(left) == 1 else None
    if one_width is not None:
        return True, one_width
    return False, (_settings(model, next(iter(dense))) if len(dense) == 1 else None) or {}


def ordinary(model: PreTrainedModel) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """MLPs as wide as the widest one, rounded up to a multiple of 32, the neurons that are added being zeros; as wide
    as the dense ones where the base has no key for the width."""
    opens, settings = base_opens(model)
    if opens:
        return settings, {}
    dense = {mlp: dense_neurons(model, mlp) for mlp in find_mlps(model)}
    widest = max(num_neurons(model, mlp) for mlp in dense)
    wide = min(max(dense.values()), -(-widest // _MULTIPLE) * _MULTIPLE)
    one_width = _settings(model, wide)
    widths = dense if one_width is None else dict.fromkeys(dense, wide)
    layers = {name: layer for mlp, width in widths.items() for name, layer in _widened(model, mlp, width).items()}
    return settings if one_width is None else one_width, layers


def _widened(model: PreTrainedModel, mlp: MLP, wide: int) -> dict[str, Any]:
    """Matrices and biases of an MLP with so many neurons, of which the last ones are zeros."""
    neurons, made = num_neurons(model, mlp), {}
    for name in mlp.inputs:
        layer = model.get_submodule(name)
        weight, bias = linear_weight(layer).detach(), _bias(layer)
        halves = len(weight) // neurons
        old, new = (rows_of(torch.arange(neurons), width, halves * width) for width in (neurons, wide))
        filled = weight.new_zeros(halves * wide, weight.shape[1])
        filled[new] = weight[old]
        if bias is not None:
            bias = bias.new_zeros(halves * wide).index_copy(0, new.to(bias.device), bias.detach()[old])
        made[name] = filled, bias
    layer = model.get_submodule(mlp.output)
    made[mlp.output] = F.pad(linear_weight(layer).detach(), (0, wide - neurons)), _bias(layer)
    return made


def _settings(model: PreTrainedModel, neurons: int) -> dict[str, Any] | None:
    """What the base's config has to say so that all MLPs have so many neurons; None where nothing does it."""
    known = vars(model.config.get_text_config())
    settings: list[dict[str, Any]] = [{}]
    for key, value in known.items():
        if _WIDTH_KEY.search(key) and (value is None or type(value) in (int, list)):  # a list has one for each layer
            settings.append({key: [neurons] * len(value) if isinstance(value, list) else neurons})
    return next((one for one in settings if _makes(model, one, neurons)), None)


def _makes(model: PreTrainedModel, settings: Mapping[str, Any], neurons: int) -> bool:
    """Whether the base makes, by its config with these settings, the modules of `model` with so many neurons."""
    config = copy.deepcopy(model.config)
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    with torch.device("meta"):
        made = base_class(type(model))(config)
    mlps = find_mlps(model)
    inside = {f"{name}.{kind}" for mlp in mlps for name in mlp.matrices for kind in ("weight", "bias")}

    def outside(one: PreTrainedModel) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in one.named_parameters() if name not in inside}

    fits = outside(made) == outside(model) and all(num_neurons(made, mlp) == neurons for mlp in mlps)
    try:
        return fits and find_mlps(made) == mlps
    except UsageError:  # its config has another key for the width too, which does not agree
        return False


def is_described(layer: Mapping[str, Any]) -> bool:
    """Whether config.json says of an MLP what it has to."""
    neurons, dense, matrices = (layer.get(key) for key in ("neurons", "dense", "matrices"))
    named = isinstance(matrices, list) and len(matrices) > 1 and all(isinstance(name, str) for name in matrices)
    return named and type(neurons) is int and type(dense) is int and 0 < neurons <= dense


def check(model: PreTrainedModel, layers: Layers) -> None:
    """Raises `DataError` naming the first MLP that is not the one that config.json describes."""
    mlps = {parent_name(mlp): mlp for mlp in find_mlps(model)}
    for name in layers:
        if name not in mlps:
            raise DataError(f"config.json gives neurons to {name}, which holds no MLP")
    for name, mlp in mlps.items():
        if name not in layers:
            raise DataError(f"config.json says nothing of the neurons of {name}, which holds an MLP")
        matrices = [matrix.rpartition(".")[2] for matrix in mlp.matrices]
        if matrices != layers[name]["matrices"]:
            raise DataError(
                f"config.json gives {name} the matrices {', '.join(layers[name]['matrices'])}: "
                f"expected {', '.join(matrices)}"
            )
        if num_neurons(model, mlp) != layers[name]["neurons"]:
            raise DataError(f"{name} has {num_neurons(model, mlp)} neurons, config.json says {layers[name]['neurons']}")


def trained(model: PreTrainedModel) -> set[str]:
    """The matrices that `distill.train: compressed` means."""
    return {name for mlp in find_mlps(model) for name in mlp.matrices}


def guard(model: PreTrainedModel) -> None:
    """Training keeps the form by itself."""


def describe(description: Description) -> dict[str, str]:
    """Facts for `inspect`."""
    widths = sorted(layer["neurons"] for layer in description.layers.values())
    return {
        "compressed": f"{description.method}, {description.reduction:.0%} of the MLP parameters removed",
        "format": "width",
        "neurons": str(widths[0]) if widths[0] == widths[-1] else f"{widths[0]} to {widths[-1]}",
    }


def from_earlier(model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
    """Version 1 had no such form."""
    raise KeyError("neurons")


# ---- making the layers


@torch.no_grad()
def keep(
    model: PreTrainedModel,
    kept: Mapping[MLP, Int[Tensor, " _"]],
    outputs: Mapping[MLP, Float[Tensor, "_ _"]],
    biases: Mapping[MLP, Float[Tensor, " _"]],
) -> None:
    """Leaves the MLPs in `kept` the neurons of these numbers, ascending, in place: of all MLPs or, after an error, of
    none.

    `outputs` has the H x K output matrix of each of them, `biases` its new bias where that changes. Raises `UsageError`
    where something beside the matrices tells neurons apart.
    """
    require_alike(model, "form width")
    made: dict[str, nn.Module] = {}
    for mlp, neurons in kept.items():
        for name in mlp.inputs:
            layer = model.get_submodule(name)
            weight, bias = linear_weight(layer), _bias(layer)
            rows = rows_of(neurons.to(weight.device), num_neurons(model, mlp), len(weight))
            made[name] = _like(layer, weight[rows], None if bias is None else bias[rows])
        layer = model.get_submodule(mlp.output)
        made[mlp.output] = _like(layer, outputs[mlp], biases.get(mlp, _bias(layer)))
    dense = {parent_name(mlp): dense_neurons(model, mlp) for mlp in kept}
    for name, layer in made.items():
        replace_module(model, name, layer)
    for name, count in dense.items():
        module: Any = model.get_submodule(name)
        module.dense_neurons = count  # `find_mlps` knows an MLP by it that is not as wide as the config says


def take_shape(model: PreTrainedModel, planned: Any) -> None:
    """Gives the MLPs of a model without weights the numbers of neurons of a `Plan`."""
    neurons = {line.name: line.neurons for line in planned.matrices}
    kept = {mlp: torch.arange(neurons[mlp.output]) for mlp in find_mlps(model)}
    keep(model, kept, {m: linear_weight(model.get_submodule(m.output))[:, : len(k)] for m, k in kept.items()}, {})


def _bias(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


def _like(layer: nn.Module, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> nn.Module:
    """A layer of the same class, number format and device with these weights."""
    old: Tensor = layer.weight  # type: ignore[assignment]
    with torch.device("meta"):
        made: Any = resized(layer, weight.shape[1], weight.shape[0])
    for name, value in (("weight", weight.T if isinstance(layer, Conv1D) else weight), ("bias", bias)):
        if value is not None:
            moved = value.detach().to(old).contiguous()
            setattr(made, name, nn.Parameter(moved, requires_grad=getattr(layer, name).requires_grad))
    return made.train(layer.training)
