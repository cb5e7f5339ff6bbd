"""Form `sliced`: a residual stream of fewer features, in a basis of its own before each norm (`_layers.py`).

Whatever writes the stream or reads it is rotated and cut to the new width: embeddings, attention, MLPs, the output
projection. Scales and biases of the norms, and the centring of a LayerNorm, go into these matrices. As published there
are two shortcuts a layer, whose matrices turn the stream into the basis of what comes next; they are parameters. Input
and output embeddings are rotated differently, so they are tied no more.

The config keeps the dense model's hidden size, from which the size of heads and the scale of embeddings are derived.

Shape letters: D hidden size of the dense model, H that of the sliced one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.device import in_float64
from sparsekd.errors import DataError, UsageError
from sparsekd.models.anatomy import hidden_size, linear_weight
from sparsekd.models.copying import twin
from sparsekd.models.forms._description import Description, Layers
from sparsekd.models.forms._layers import rebuild
from sparsekd.models.forms._stream import Norm as Norm
from sparsekd.models.forms._stream import Stream as Stream
from sparsekd.models.forms._stream import eps_of, has_bias
from sparsekd.models.forms._stream import find_stream as find_stream
from sparsekd.models.forms._stream import norm_of as norm_of

# ---- the form


def layers(model: PreTrainedModel) -> Layers:
    """What config.json says of each module that the stream's width concerns; attention and MLP speak for the norm
    before them too."""
    return {name: module.sliced for name, module in model.named_modules() if hasattr(module, "sliced")}  # type: ignore[misc]


def base_opens(model: PreTrainedModel) -> tuple[bool, dict[str, Any]]:
    """No base has such layers."""
    return False, {"tie_word_embeddings": False}


def ordinary(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises `UsageError`: no base has a matrix on its shortcuts."""
    raise UsageError(
        "a sliced model has matrices on its shortcuts, for which no other architecture has a place: "
        "sparsekd.load opens it, and formats onnx and openvino take it"
    )


def is_described(layer: Mapping[str, Any]) -> bool:
    """Whether config.json says of a module what it has to."""
    types = {"hidden": int, "dense": int, "eps": float, "bias": bool, "norm": str, "reads": list, "writes": str}
    kinds = {"hidden"}, {"hidden", "bias"}, {"hidden", "dense", "eps"}, types.keys()
    return layer.keys() in kinds and all(type(value) is types[key] for key, value in layer.items())


def check(model: PreTrainedModel, layers: Layers) -> None:
    """Raises `DataError` for a module that is not the one that config.json describes."""
    hidden = hidden_size(model)
    found = {name: module for name, module in model.named_modules() if hasattr(module, "sliced")}
    for name in sorted(found.keys() | layers.keys()):
        if name not in found or found[name].sliced != layers.get(name) or layers[name]["hidden"] != hidden:
            raise DataError(f"{name} is not what config.json says: expected a residual stream of {hidden} features")


def trained(model: PreTrainedModel) -> set[str]:
    """The modules that `distill.train: compressed` means: matrices and shortcuts of the layers; embeddings and output
    projection stay."""
    branches = [layer for layer in layers(model).values() if "reads" in layer]
    return {name for layer in branches for name in (*layer["reads"], layer["writes"], f"{layer['norm']}.shortcut")}


def guard(model: PreTrainedModel) -> None:
    """Training keeps the form by itself."""


def describe(description: Description) -> dict[str, str]:
    """Facts for `inspect`."""
    norm = next(layer for layer in description.layers.values() if "dense" in layer)
    return {
        "compressed": f"{description.method}, {description.reduction:.0%} of the MLP parameters removed",
        "format": "sliced",
        "hidden size": f"{norm['hidden']} of {norm['dense']}",
    }


def from_earlier(model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
    """Version 1 had no such form."""
    raise KeyError("hidden")


# ---- making the layers


def described(model: PreTrainedModel, stream: Stream, hidden: int) -> Layers:
    """What config.json says of the modules of a dense model when its stream is sliced to so many features."""
    dense = hidden_size(model)
    found: dict[str, dict[str, Any]] = {name: {"hidden": hidden} for name in stream.embeddings}
    for branch in stream.branches:
        found[branch.name] = {
            "hidden": hidden,
            "dense": dense,
            "eps": eps_of(model, branch.norm),
            "bias": has_bias(model, branch.norm),
            "norm": branch.norm,
            "reads": list(branch.reads),
            "writes": branch.writes,
        }
    found[stream.norm] = {"hidden": hidden, "dense": dense, "eps": eps_of(model, stream.norm)}
    found[stream.head] = {"hidden": hidden, "bias": has_bias(model, stream.norm)}
    return found


def without_weights(model: PreTrainedModel, layers: Layers) -> PreTrainedModel:
    """A copy of a dense model with these layers, whose weights are on the meta device."""
    copied = twin(model)
    with torch.device("meta"):
        rebuild(copied, layers)
    return copied


@torch.no_grad()
def rotated(
    model: PreTrainedModel, stream: Stream, norms: Sequence[Norm], bases: Sequence[Float[Tensor, "D H"]]
) -> dict[str, Tensor]:
    """The parameters of the sliced model that are not the dense one's, by name: `bases` are orthonormal columns before
    each of the `norms`, in float64, those of the branches and then the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> None:
        layer: Any = model.get_submodule(name)
        stored = weight.T if isinstance(layer, Conv1D) else weight
        found[f"{name}.weight"] = stored.to(layer.weight).contiguous()
        if bias is not None:
            found[f"{name}.bias"] = bias.to(layer.weight)

    def read(name: str, norm: Norm, basis: Float[Tensor, "D H"]) -> None:
        weight, bias = _exact(model.get_submodule(name))
        shift = None if norm.bias is None else weight @ in_float64(norm.bias)
        both = [one for one in (bias, shift) if one is not None]
        keep(
            name, weight * in_float64(norm.scale) @ basis.to(weight.device), torch.stack(both).sum(0) if both else None
        )

    def write(name: str, norm: Norm, basis: Float[Tensor, "D H"]) -> None:
        weight, bias = _exact(model.get_submodule(name))
        columns = norm.centred(weight.T) @ basis.to(weight.device)
        keep(name, columns.T, None if bias is None else norm.centred(bias) @ basis.to(weight.device))

    for name in stream.embeddings:
        weight = in_float64(model.get_submodule(name).weight)  # type: ignore[arg-type]
        found[f"{name}.weight"] = (norms[0].centred(weight) @ bases[0].to(weight.device)).to(model.dtype)
    for branch, norm, (basis, after) in zip(stream.branches, norms, itertools.pairwise(bases), strict=False):
        for name in branch.reads:
            read(name, norm, basis)
        write(branch.writes, norm, after)
        found[f"{branch.norm}.shortcut.weight"] = (after.T @ basis).to(model.device, model.dtype)
    read(stream.head, norms[-1], bases[-1])
    return found


def _exact(layer: nn.Module) -> tuple[Float[Tensor, "O I"], Float[Tensor, " O"] | None]:
    """Matrix and bias in float64."""
    bias: Any = getattr(layer, "bias", None)
    return in_float64(linear_weight(layer)), None if bias is None else in_float64(bias)


def put(model: PreTrainedModel, layers: Layers, weights: Mapping[str, Tensor]) -> None:
    """Makes a dense model a sliced one, in place."""
    with torch.device("meta"):
        rebuild(model, layers)
    for name, value in weights.items():
        owner, _, kind = name.rpartition(".")
        setattr(model.get_submodule(owner), kind, nn.Parameter(value))
    model.train(model.training)
