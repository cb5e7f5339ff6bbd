"""Form `lowrank`: MLP matrices as two factors, or as pivots and combinations of them (`_layers.py`).

The neurons of an MLP can be renumbered. The pivot format uses this freedom once, when it is made, so that the pivots of
all three matrices come first.

Shape letters: I input features, O output features, R rank, N neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.device import in_float64
from sparsekd.errors import DataError, UsageError
from sparsekd.models.anatomy import MLP, find_mlps, linear_weight, replace_module, shape
from sparsekd.models.forms._description import Description, Layers
from sparsekd.models.forms._layers import (
    KINDS,
    ColumnPivotLinear,
    CompressedLinear,
    LowRankLinear,
    RowPivotLinear,
)
from sparsekd.models.forms._neurons import num_neurons, require_alike, rows_of
from sparsekd.models.forms._pivots import combinations, common_pivots

Factors = tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]  # up, down
FORMATS = ("pivot", "lowrank")


# ---- the form


def layers(model: PreTrainedModel) -> Layers:
    """What config.json says of each layer that is compressed: its rank and kind."""
    return {name: {"rank": layer.rank, "kind": layer.kind} for name, layer in compressed_layers(model).items()}


def base_opens(model: PreTrainedModel) -> tuple[bool, dict[str, Any]]:
    """No base has such layers."""
    return False, {}


def ordinary(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The products of the factors; the base's config says all it has to."""
    found: dict[str, Any] = compressed_layers(model)
    return {}, {name: (linear_weight(layer).detach(), layer.bias) for name, layer in found.items()}


def is_described(layer: Mapping[str, Any]) -> bool:
    """Whether config.json says of a layer what it has to."""
    return type(layer.get("rank")) is int and layer["rank"] > 0 and layer.get("kind") in KINDS


def check(model: PreTrainedModel, layers: Layers) -> None:
    """Raises `DataError` for a rank that config.json gives to what is no matrix of an MLP."""
    matrices = {name for mlp in find_mlps(model) for name in mlp.matrices}
    for name in layers:
        if name not in matrices:
            raise DataError(f"config.json gives a rank to {name}, which is no matrix of an MLP")


def trained(model: PreTrainedModel) -> set[str]:
    """The layers that `distill.train: compressed` means."""
    return set(compressed_layers(model))


def guard(model: PreTrainedModel) -> None:
    """Training keeps the form by itself."""


def describe(description: Description) -> dict[str, str]:
    """Facts for `inspect`."""
    layers = description.layers.values()
    ranks = [layer["rank"] for layer in layers]
    formats = {"lowrank" if layer["kind"] == LowRankLinear.kind else "pivot" for layer in layers}
    return {
        "compressed": f"{description.method}, {description.reduction:.0%} of the MLP parameters removed",
        "format": " and ".join(sorted(formats)),
        "ranks": f"{min(ranks)} to {max(ranks)}",
    }


def compressed_layers(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    """The low-rank layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def from_earlier(model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
    """The layers of a description that version 1 wrote, which had one format for all; `model` is the dense one."""
    reading = {mlp.output for mlp in find_mlps(model)}
    ranks = description["ranks"]
    return {
        name: {"rank": rank, "kind": kind_of(description["format"], reads_neurons=name in reading)}
        for name, rank in ranks.items()
    }


# ---- sizes


def num_weights(in_features: int, out_features: int, rank: int, layer_format: str) -> int:
    """Weights of a layer of that format and rank, without its bias."""
    plain = rank * (in_features + out_features)
    return plain if layer_format == "lowrank" else plain - rank**2


def rank_for(in_features: int, out_features: int, budget: float, layer_format: str) -> int:
    """The largest rank, at least 1, whose layer has at most `budget` weights, a number up to that of the dense layer.

    For `pivot` it is the smaller root of `r (I + O) - r^2 = budget`.
    """
    total = in_features + out_features
    rank = budget / total if layer_format == "lowrank" else (total - math.sqrt(total**2 - 4 * budget)) / 2
    # the small term keeps a budget that is a whole number of ranks from losing one to rounding
    return max(1, int(rank + 1e-9))


# ---- making the layers


def kind_of(layer_format: str, reads_neurons: bool) -> str:
    """The kind of layer of a format for a matrix that reads an MLP's neurons, or for one that writes them."""
    if layer_format == "lowrank":
        return LowRankLinear.kind
    return ColumnPivotLinear.kind if reads_neurons else RowPivotLinear.kind


def make_layer(
    kind: str,
    up: Float[Tensor, "O R"],
    down: Float[Tensor, "R I"],
    bias: Float[Tensor, " O"] | None = None,
) -> CompressedLinear:
    """The layer of `up @ down`, exact up to rounding."""
    with torch.device("meta"):
        cls: Any = KINDS[kind]
        layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None)
    rank = layer.rank
    if kind == RowPivotLinear.kind:
        exact = in_float64(up)
        layer.pivots.weight = _parameter((exact[:rank] @ in_float64(down)).to(down))
        layer.rest.weight = _parameter(combinations(exact[:rank], exact[rank:]).to(up))
        owner = layer
    elif kind == ColumnPivotLinear.kind:
        exact = in_float64(down)
        pivots = exact[:, :rank]
        layer.pivots.weight = _parameter((in_float64(up) @ pivots).to(up))
        layer.rest.weight = _parameter(combinations(pivots.T, exact[:, rank:].T).T.to(down))
        owner = layer.pivots
    else:
        layer.down.weight, layer.up.weight, owner = _parameter(down), _parameter(up), layer.up
    if bias is not None:
        owner.bias = _parameter(bias)
    return layer


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous())


def convert(model: PreTrainedModel, layer_format: str) -> PreTrainedModel:
    """Rewrites a compressed model, in place, in another format without loss; the ranks stay.

    `lowrank` to `pivot` saves R^2 numbers a matrix. Raises `UsageError` for an unknown format or a dense model.
    """
    if layer_format not in FORMATS:
        raise UsageError(f"format is {layer_format!r}: expected one of {', '.join(FORMATS)}")
    compressed = compressed_layers(model)
    if not compressed:
        raise UsageError("the model is not compressed: there is no format to convert")
    put(model, {name: layer.factors() for name, layer in compressed.items()}, layer_format)
    config: Any = model.config
    config.sparsekd = {**config.sparsekd, "layers": layers(model)}
    return model


@torch.no_grad()
def put(model: PreTrainedModel, factors: dict[str, Factors], layer_format: str) -> None:
    """Replaces each linear layer named in `factors` by a layer of that format, after all of them are made: an error
    leaves the model as it was. The names must contain all layers that are compressed already. Empties `factors`."""
    if layer_format == "pivot":
        require_alike(model, "format pivot")
    made: dict[str, nn.Module] = {}
    moved: list[tuple[Tensor, Tensor]] = []
    for mlp in find_mlps(model):
        names = [name for name in mlp.matrices if name in factors]
        neurons = num_neurons(model, mlp)
        order = (
            _order(mlp, {name: factors[name] for name in names}, neurons) if layer_format == "pivot" and names else None
        )
        for name in mlp.matrices:
            module, reads = model.get_submodule(name), name == mlp.output
            bias: Tensor | None = getattr(module, "bias", None)
            rows = None if order is None or reads else rows_of(order, neurons, shape(module)[1])
            if bias is not None and rows is not None:
                bias = bias[rows]
            if name in factors:
                up, down = factors.pop(name)
                up, down = (up if rows is None else up[rows]), (down[:, order] if order is not None and reads else down)
                made[name] = make_layer(kind_of(layer_format, reads), up, down, bias)
            elif order is not None:
                weight = linear_weight(module)
                moved.append((weight, weight[:, order] if reads else weight[rows]))
                if bias is not None:
                    moved.append((module.bias, bias))  # type: ignore[arg-type]
    for old, new in moved:
        old.copy_(new)
    for name, layer in made.items():
        replace_module(model, name, layer.to(model.dtype))


def _order(mlp: MLP, factors: Mapping[str, Factors], neurons: int) -> Int[Tensor, " N"]:
    """The order of the neurons that puts pivots of every matrix first; of a fused gate and up, pivots of the gate."""
    return common_pivots([down.T if name == mlp.output else up[:neurons] for name, (up, down) in factors.items()])
