"""Replace the MLP weights of a model by low-rank ones; attention, norms and embeddings stay.

`compress` is the whole stage: statistics, solver, ranks, replacement. Both methods project a matrix's outputs on the
directions that matter most; they differ in what "matters" means: `svd` (the paper's) looks at the weight alone,
`whitened` at the outputs on the calibration corpus. `docs/compress.md` has the mathematics and what each costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.compression import lowrank, statistics
from sparsekd.errors import DataError, UsageError
from sparsekd.layers import FORMATS, CompressedLinear, num_weights, rank_for
from sparsekd.models import (
    MLP,
    dense_weight,
    find_mlps,
    is_compressed,
    mark_compressed,
    num_parameters,
    replace_module,
    shape,
)

METHODS = ("whitened", "svd")


@dataclass(frozen=True)
class MatrixPlan:
    """What happens to one matrix: parameters are counted with its bias."""

    name: str
    in_features: int
    out_features: int
    rank: int
    parameters_before: int
    parameters_after: int
    relative_error: float | None = None  # share of the output energy lost; None before the statistics are known


@dataclass(frozen=True)
class Plan:
    """The structural step in numbers: a line a matrix, and the reduction of the MLPs and of the whole model."""

    matrices: list[MatrixPlan]
    model_parameters_before: int

    @property
    def mlp_parameters_before(self) -> int:
        return sum(matrix.parameters_before for matrix in self.matrices)

    @property
    def mlp_parameters_after(self) -> int:
        return sum(matrix.parameters_after for matrix in self.matrices)

    @property
    def model_parameters_after(self) -> int:
        return self.model_parameters_before - self.mlp_parameters_before + self.mlp_parameters_after

    @property
    def mlp_reduction(self) -> float:
        return 1 - self.mlp_parameters_after / self.mlp_parameters_before

    @property
    def model_reduction(self) -> float:
        return 1 - self.model_parameters_after / self.model_parameters_before

    def as_dict(self) -> dict[str, Any]:
        names = ("parameters_before", "parameters_after", "reduction")
        totals = {f"{part}_{name}": getattr(self, f"{part}_{name}") for part in ("mlp", "model") for name in names}
        return totals | {"matrices": [asdict(matrix) for matrix in self.matrices]}


def compress(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "B L"]] | Int[Tensor, "N L"] | None = None,
    *,
    reduction: float = 0.15,
    method: str = "whitened",
    layer_format: str = "pivot",
) -> PreTrainedModel:
    """Makes the MLPs of `model` low-rank, in place, and returns it: an ordinary model with fewer weights.

    `reduction` is the fraction of the MLP parameters to remove, in (0, 0.95]. `blocks` are token ids to take the
    statistics from, as one tensor or as batches; `svd` needs none. `layer_format` is `pivot` or `lowrank`. Raises `UsageError` for a value out of range, a
    model without an MLP or one that is compressed already, `DataError` for weights or activations that are not
    finite; the model is then unchanged.
    """
    truncate(model, blocks, reduction=reduction, method=method, layer_format=layer_format)
    return model


def truncate(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "B L"]] | Int[Tensor, "N L"] | None,
    *,
    reduction: float,
    method: str,
    layer_format: str,
) -> Plan:
    """What `compress` does, returning the plan with the damage that was predicted for each matrix."""
    if not 0 < reduction <= 0.95:
        raise UsageError(f"reduction is {reduction}: expected a fraction of the MLP parameters in (0, 0.95]")
    if method not in METHODS:
        raise UsageError(f"method is {method!r}: expected one of {', '.join(METHODS)}")
    if layer_format not in FORMATS:
        raise UsageError(f"format is {layer_format!r}: expected one of {', '.join(FORMATS)}")
    if is_compressed(model):
        raise UsageError("the model is compressed already: start from the dense one")
    before = plan(model, reduction, layer_format)
    for matrix in before.matrices:
        if not torch.isfinite(dense_weight(model.get_submodule(matrix.name))).all():
            raise DataError(f"the weight of {matrix.name} is not finite: the model is damaged")
    grams = None
    if method == "whitened":
        if blocks is None:
            raise UsageError("method 'whitened' needs token blocks to take statistics from; 'svd' does not")
        grams = statistics.collect(model, blocks.split(4) if isinstance(blocks, Tensor) else blocks)
    ranks = {matrix.name: matrix.rank for matrix in before.matrices}
    layers, errors = {}, {}
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            layers[name], errors[name] = _factorize(model, mlp, name, ranks[name], layer_format, grams)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    ranks = {name: layer.rank for name, layer in layers.items()}
    mark_compressed(model, {"format": layer_format, "method": method, "reduction": reduction, "ranks": ranks})
    done = [_with_error(matrix, ranks[matrix.name], errors[matrix.name], layer_format) for matrix in before.matrices]
    return Plan(done, before.model_parameters_before)


def plan(model: PreTrainedModel, reduction: float, layer_format: str) -> Plan:
    """Uniform ranks: every matrix loses the same fraction of its weights. Works on a model without weights too."""
    matrices = []
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            module = model.get_submodule(name)
            matrices.append(_matrix_plan(name, module, rank_for(*shape(module), reduction, layer_format), layer_format))
    return Plan(matrices, num_parameters(model))


def _matrix_plan(name: str, module: nn.Module, rank: int, layer_format: str) -> MatrixPlan:
    inputs, outputs = shape(module)
    bias = outputs if getattr(module, "bias", None) is not None else 0
    after = num_weights(inputs, outputs, rank, layer_format) + bias
    return MatrixPlan(name, inputs, outputs, rank, inputs * outputs + bias, after)


def _with_error(matrix: MatrixPlan, rank: int, error: float, layer_format: str) -> MatrixPlan:
    """The plan of a matrix after the fact; its rank may be lower where the matrix itself has fewer directions."""
    planned, found = (
        num_weights(matrix.in_features, matrix.out_features, r, layer_format) for r in (matrix.rank, rank)
    )
    after = matrix.parameters_after - planned + found
    return MatrixPlan(**(asdict(matrix) | {"rank": rank, "parameters_after": after, "relative_error": error}))


def _factorize(
    model: PreTrainedModel,
    mlp: MLP,
    name: str,
    rank: int,
    layer_format: str,
    grams: dict[MLP, tuple[statistics.Gram, statistics.Gram]] | None,
) -> tuple[CompressedLinear, float]:
    module = model.get_submodule(name)
    weight = dense_weight(module).detach()
    if grams is None:
        projection = lowrank.from_input_gram(weight, None)
    elif name == mlp.output:
        projection = lowrank.from_output_gram(grams[mlp][1].mean().to(weight.device))
    else:
        projection = lowrank.from_input_gram(weight, grams[mlp][0].mean().to(weight.device))
    up, down = projection.factors(weight, rank)
    bias = getattr(module, "bias", None)
    layer = FORMATS[layer_format].from_factors(up, down, None if bias is None else bias.detach())
    return layer.to(weight.device), projection.relative_error(rank)
