"""Put factors into a model's MLPs in a format, and change the format of what is there.

The neurons of an MLP can be renumbered: rows of gate and up (of both halves, where the two are one matrix), columns of
down. The pivot format uses this freedom once, when it is made, so that the pivots of all three matrices come first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.errors import UsageError
from sparsekd.models import (
    FORMATS,
    MLP,
    CompressedLinear,
    common_pivots,
    find_mlps,
    is_compressed,
    is_linear,
    layer_class,
    linear_weight,
    replace_module,
    shape,
)

Factors = tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]  # up, down


def convert(model: PreTrainedModel, layer_format: str) -> PreTrainedModel:
    """Rewrites a compressed model, in place, in another format without loss; the ranks stay.

    `lowrank` to `pivot` saves R^2 numbers a matrix. Raises `UsageError` for an unknown format or a dense model.
    """
    if layer_format not in FORMATS:
        raise UsageError(f"format is {layer_format!r}: expected one of {', '.join(FORMATS)}")
    if not is_compressed(model):
        raise UsageError("the model is not compressed: there is no format to convert")
    compressed = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    put(model, {name: module.factors() for name, module in compressed.items()}, layer_format)
    model.config.sparsekd = {**model.config.sparsekd, "format": layer_format}  # type: ignore[misc]
    return model


@torch.no_grad()
def put(model: PreTrainedModel, factors: dict[str, Factors], layer_format: str) -> None:
    """Replaces each linear layer named in `factors` by a layer of that format, after all of them are made: an error
    leaves the model as it was. The names must contain all layers that are compressed already. Empties `factors`."""
    if layer_format == "pivot":
        _check_renumbering(model)
    layers: dict[str, nn.Module] = {}
    moved: list[tuple[Tensor, Tensor]] = []
    for mlp in find_mlps(model):
        names = [name for name in mlp.matrices if name in factors]
        neurons = shape(model.get_submodule(mlp.output))[0]
        order = (
            _order(mlp, {name: factors[name] for name in names}, neurons) if layer_format == "pivot" and names else None
        )
        for name in mlp.matrices:
            module, reads = model.get_submodule(name), name == mlp.output
            bias: Tensor | None = getattr(module, "bias", None)
            rows = None if order is None or reads else _rows(order, shape(module)[1])
            if bias is not None and rows is not None:
                bias = bias[rows]
            if name in factors:
                up, down = factors.pop(name)
                up, down = (up if rows is None else up[rows]), (down[:, order] if order is not None and reads else down)
                layers[name] = layer_class(layer_format, reads).from_factors(up, down, bias)
            elif order is not None:
                weight = linear_weight(module)
                moved.append((weight, weight[:, order] if reads else weight[rows]))
                if bias is not None:
                    moved.append((module.bias, bias))  # type: ignore[arg-type]
    for old, new in moved:
        old.copy_(new)
    for name, layer in layers.items():
        replace_module(model, name, layer.to(model.dtype))


def _order(mlp: MLP, factors: Mapping[str, Factors], neurons: int) -> Int[Tensor, " N"]:
    """The order of the neurons that puts pivots of every matrix first; of a fused gate and up, pivots of the gate."""
    return common_pivots([down.T if name == mlp.output else up[:neurons] for name, (up, down) in factors.items()])


def _rows(order: Int[Tensor, " N"], out_features: int) -> Int[Tensor, " O"]:
    return torch.cat([order + start for start in range(0, out_features, len(order))])


def _check_renumbering(model: PreTrainedModel) -> None:
    """Raises `UsageError` where something beside the linear layers tells the neurons of an MLP apart."""
    mlps = find_mlps(model)
    for mlp in mlps:
        parent, neurons = _parent(model, mlp), shape(model.get_submodule(mlp.output))[0]
        others = [p for child in parent.children() if not is_linear(child) for p in child.parameters()]
        if neurons != shape(model.get_submodule(mlp.output))[1] and any(p.shape == (neurons,) for p in others):
            raise _not_renumbered(mlp, "has a parameter for each neuron")
    if is_compressed(model):
        return  # it was found before
    fused = next((mlp for mlp in mlps if _is_fused(model, mlp)), None)
    if fused is not None and not _halves_are_gate_and_up(model, fused):
        raise _not_renumbered(fused, "does not read its fused matrix as two halves")


def _not_renumbered(mlp: MLP, why: str) -> UsageError:
    return UsageError(f"{mlp.output.rpartition('.')[0]} {why}: format pivot cannot be used, lowrank can")


def _parent(model: PreTrainedModel, mlp: MLP) -> nn.Module:
    return model.get_submodule(mlp.output.rpartition(".")[0])


def _is_fused(model: PreTrainedModel, mlp: MLP) -> bool:
    return shape(model.get_submodule(mlp.inputs[0]))[1] == 2 * shape(model.get_submodule(mlp.output))[0]


def _halves_are_gate_and_up(model: PreTrainedModel, mlp: MLP) -> bool:
    """Whether a copy of the MLP whose neurons are all moved by one computes the same."""
    parent = _parent(model, mlp)
    moved = copy.deepcopy(parent)
    fused, output = (moved.get_submodule(name.rpartition(".")[2]) for name in mlp.matrices)
    order = torch.arange(shape(output)[0], device=model.device).roll(1)
    rows = _rows(order, shape(fused)[1])
    linear_weight(fused).copy_(linear_weight(fused)[rows])
    linear_weight(output).copy_(linear_weight(output)[:, order])
    if isinstance(fused.bias, Tensor):
        fused.bias.copy_(fused.bias[rows])
    x = torch.randn(16, shape(fused)[0], generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    expected = parent(x)
    return bool(torch.allclose(moved(x), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())))
