"""Replace the MLP weights of a model by low-rank ones; attention, norms and embeddings stay.

`compress` is the whole stage: statistics, solver, ranks, replacement. Every method projects a matrix's outputs on the
directions that matter most; they differ in what "matters" means: `svd` (the paper's) looks at the weight alone,
`whitened` at the outputs on the calibration corpus, `two-sided` at what a change of these outputs does to the model's
distribution. `docs/compress.md` has the mathematics and what each costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.compression import lowrank, statistics
from sparsekd.compression.allocate import Curve, allocate
from sparsekd.errors import DataError, UsageError
from sparsekd.layers import FORMATS, num_weights, rank_for
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

METHODS = ("whitened", "svd", "two-sided")
ALLOCATIONS = ("uniform", "global")
_FLOOR = 0.2  # global allocation leaves each matrix at least this share of its uniform rank


@dataclass(frozen=True)
class MatrixPlan:
    """What happens to one matrix: parameters are counted with its bias. A rank of None leaves it dense."""

    name: str
    in_features: int
    out_features: int
    rank: int | None
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
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None = None,
    *,
    reduction: float = 0.15,
    method: str = "whitened",
    allocation: str = "uniform",
    layer_format: str = "pivot",
) -> PreTrainedModel:
    """Makes the MLPs of `model` low-rank, in place, and returns it: an ordinary model with fewer weights.

    `reduction` is the fraction of the MLP parameters to remove, in (0, 0.95]. `blocks` are token ids to take the
    statistics from, as one tensor or as batches; `svd` needs none. `method` is `whitened`, `svd` or `two-sided`;
    `allocation` is `uniform` or, for `two-sided`, `global`; `layer_format` is `pivot` or `lowrank`. Raises
    `UsageError` for a value out of range, a model without an MLP or one that is compressed already, `DataError` for
    weights or activations that are not finite; the model is then unchanged.
    """
    truncate(model, blocks, reduction=reduction, method=method, allocation=allocation, layer_format=layer_format)
    return model


def truncate(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None,
    *,
    reduction: float,
    method: str = "whitened",
    allocation: str = "uniform",
    layer_format: str = "pivot",
    seed: int = 0,
) -> Plan:
    """What `compress` does, returning the plan with the damage that was predicted for each matrix."""
    if not 0 < reduction <= 0.95:
        raise UsageError(f"reduction is {reduction}: expected a fraction of the MLP parameters in (0, 0.95]")
    for name, value, known in (
        ("method", method, METHODS),
        ("allocation", allocation, ALLOCATIONS),
        ("format", layer_format, FORMATS),
    ):
        if value not in known:
            raise UsageError(f"{name} is {value!r}: expected one of {', '.join(known)}")
    if allocation == "global" and method != "two-sided":
        raise UsageError(
            f"allocation 'global' compares matrices by curvature: it needs method 'two-sided', not {method}"
        )
    uniform = plan(model, reduction, layer_format)
    for matrix in uniform.matrices:
        if not torch.isfinite(dense_weight(model.get_submodule(matrix.name))).all():
            raise DataError(f"the weight of {matrix.name} is not finite: the model is damaged")
    projections = _project(model, blocks, method, seed)
    done = uniform if allocation == "uniform" else _global_plan(uniform, projections, reduction, layer_format)
    done = _with_errors(done, projections, layer_format)
    _replace(model, done, projections, layer_format)
    ranks = {matrix.name: matrix.rank for matrix in done.matrices if matrix.rank is not None}
    description = {"format": layer_format, "method": method, "allocation": allocation, "reduction": reduction}
    mark_compressed(model, description | {"ranks": ranks})
    return done


def plan(model: PreTrainedModel, reduction: float, layer_format: str) -> Plan:
    """Uniform ranks: every matrix loses the same fraction of its weights. Works on a model without weights too."""
    if is_compressed(model):
        raise UsageError("the model is compressed already: start from the dense one")
    matrices = []
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            module = model.get_submodule(name)
            inputs, outputs = shape(module)
            bias = _num_bias(module)
            before = inputs * outputs + bias
            dense = MatrixPlan(name, inputs, outputs, None, before, before)
            rank = rank_for(inputs, outputs, (1 - reduction) * before - bias, layer_format)
            matrices.append(_with_rank(dense, rank, layer_format))
    return Plan(matrices, num_parameters(model))


def _num_bias(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return 0 if bias is None else bias.numel()


def _with_rank(matrix: MatrixPlan, rank: int | None, layer_format: str) -> MatrixPlan:
    dense = matrix.in_features * matrix.out_features
    weights = dense if rank is None else num_weights(matrix.in_features, matrix.out_features, rank, layer_format)
    return replace(matrix, rank=rank, parameters_after=matrix.parameters_before - dense + weights)


def _project(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]] | Int[Tensor, "N L"] | None,
    method: str,
    seed: int,
) -> dict[str, lowrank.Projection]:
    """The directions of every matrix by its name, from the statistics that the method needs."""
    moments: dict[MLP, statistics.Moments] = {}
    if method != "svd":
        if blocks is None:
            raise UsageError(f"method {method!r} needs token blocks to take statistics from; 'svd' does not")
        batches = blocks.split(4) if isinstance(blocks, Tensor) else blocks
        moments = statistics.collect(model, batches, curvature=method == "two-sided", seed=seed)
    projections = {}
    for mlp in find_mlps(model):
        seen = moments.get(mlp)
        for name in mlp.matrices:
            weight = dense_weight(model.get_submodule(name)).detach()
            if seen is None:
                projections[name] = lowrank.from_input_gram(weight, None)
            elif name == mlp.output:
                curvature = seen.output_curvature.mean().to(weight.device) if method == "two-sided" else None
                projections[name] = lowrank.from_output_gram(seen.output.mean().to(weight.device), curvature)
            else:
                curvature = seen.input_curvature[name].mean().to(weight.device) if method == "two-sided" else None
                gram = seen.input.mean().to(weight.device)
                projections[name] = lowrank.from_input_gram(weight, gram, curvature)
    return projections


def _global_plan(
    uniform: Plan, projections: dict[str, lowrank.Projection], reduction: float, layer_format: str
) -> Plan:
    """Ranks that minimise the predicted loss of all matrices together; where full rank is best it stays dense."""
    curves = []
    for matrix in uniform.matrices:
        full = min(matrix.in_features, matrix.out_features)
        energy = projections[matrix.name].energy.cpu().numpy()
        lost = np.zeros(full + 1)
        lost[: len(energy)] = energy[::-1].cumsum()[::-1]  # lost[r] = energy of all directions from r on
        dense = matrix.in_features * matrix.out_features
        ranks = np.arange(max(1, round(_FLOOR * (matrix.rank or full))), full + 1)
        costs = np.array([num_weights(matrix.in_features, matrix.out_features, int(r), layer_format) for r in ranks])
        keep = costs < dense
        ranks, costs = np.append(ranks[keep], full + 1), np.append(costs[keep], dense)
        curves.append(Curve(ranks, costs, np.append(lost[ranks[:-1]], 0.0)))
    biases = uniform.mlp_parameters_before - sum(m.in_features * m.out_features for m in uniform.matrices)
    chosen = allocate(curves, (1 - reduction) * uniform.mlp_parameters_before - biases)
    matrices = [
        _with_rank(matrix, None if rank > min(matrix.in_features, matrix.out_features) else rank, layer_format)
        for matrix, rank in zip(uniform.matrices, chosen, strict=True)
    ]
    return replace(uniform, matrices=matrices)


def _with_errors(planned: Plan, projections: dict[str, lowrank.Projection], layer_format: str) -> Plan:
    """The plan with the damage predicted; a rank is lower where the matrix itself has fewer directions."""
    matrices = []
    for matrix in planned.matrices:
        projection = projections[matrix.name]
        if matrix.rank is None:
            matrices.append(replace(matrix, relative_error=0.0))
            continue
        rank = min(matrix.rank, len(projection.energy))
        error = projection.relative_error(rank)
        matrices.append(replace(_with_rank(matrix, rank, layer_format), relative_error=error))
    return replace(planned, matrices=matrices)


def _replace(model: PreTrainedModel, done: Plan, projections: dict[str, lowrank.Projection], layer_format: str) -> None:
    """Puts the compressed layers in place, after all of them are made: an error leaves the model as it was."""
    layers = {}
    for matrix in done.matrices:
        if matrix.rank is None:
            continue
        module = model.get_submodule(matrix.name)
        weight = dense_weight(module).detach()
        up, down = projections[matrix.name].factors(weight, matrix.rank)
        bias = getattr(module, "bias", None)
        layers[matrix.name] = FORMATS[layer_format].from_factors(up, down, None if bias is None else bias.detach())
    for name, layer in layers.items():
        replace_module(model, name, layer)
