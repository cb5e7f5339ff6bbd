"""Which rank each matrix gets, and what that is predicted to cost: the plan of the structural step.

Uniform ranks need the shapes alone, so a plan can be printed before a weight is read. The others weigh matrices by
their energy (the paper's tiers), by curvature, or by the KL that the probe measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from sparsekd import files
from sparsekd.compression.allocate import Curve, allocate, allocate_energy
from sparsekd.compression.lowrank import Projection
from sparsekd.compression.probe import Probe
from sparsekd.errors import DataError, UsageError
from sparsekd.models import CompressedLinear, find_mlps, linear_weight, num_parameters, num_weights, rank_for, shape
from sparsekd.recipe import Compress


@dataclass(frozen=True)
class MatrixPlan:
    """What happens to one matrix: parameters are counted with its bias. A rank of None leaves it dense.

    Losses are KL to the model as it was, in nats a token, of a truncation of this matrix alone. Pruned weights are not
    counted as parameters, though `zeros` of them stay in the dense matrix.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    max_rank: int  # of the model as it is: lower than full where it is compressed already
    parameters_before: int  # of the dense matrix
    parameters_after: int
    relative_error: float | None = None  # share of the output energy lost; None before the statistics are known
    predicted_kl: float | None = None  # from curvature, times what the probe found; None where there is neither
    probed_rank: int | None = None
    probed_kl: float | None = None  # measured at the probed rank
    predicted_at_probed_rank: float | None = None  # without the probe
    zeros: int = 0  # pruned weights


@dataclass(frozen=True)
class Plan:
    """The structural step in numbers: a line a matrix, and the reduction of the MLPs and of the whole model."""

    matrices: list[MatrixPlan]
    model_parameters_before: int  # of the dense model
    predicted_kl: float | None = None  # the sum over the matrices; on other text it is more
    measured_kl: float | None = None  # of all matrices together, on the probe's tokens

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
    def model_parameters_stored(self) -> int:
        """Numbers that a file, memory and every product still have: pruned weights too."""
        return self.model_parameters_after + sum(matrix.zeros for matrix in self.matrices)

    @property
    def mlp_reduction(self) -> float:
        return 1 - self.mlp_parameters_after / self.mlp_parameters_before

    @property
    def model_reduction(self) -> float:
        return 1 - self.model_parameters_after / self.model_parameters_before

    def as_dict(self) -> dict[str, Any]:
        names = ("parameters_before", "parameters_after", "reduction")
        totals = {f"{part}_{name}": getattr(self, f"{part}_{name}") for part in ("mlp", "model") for name in names}
        totals["model_parameters_stored"] = self.model_parameters_stored
        found = {"predicted_kl": self.predicted_kl, "measured_kl": self.measured_kl}
        return totals | found | {"matrices": [asdict(matrix) for matrix in self.matrices]}


def plan(model: PreTrainedModel, options: Compress) -> Plan:
    """Uniform ranks: every matrix loses the same fraction of its weights. Works on a model without weights too."""
    matrices = []
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            module = model.get_submodule(name)
            inputs, outputs = shape(module)
            bias = _num_bias(module)
            before = inputs * outputs + bias
            max_rank = module.rank if isinstance(module, CompressedLinear) else min(inputs, outputs)
            rank = rank_for(inputs, outputs, (1 - options.reduction) * before - bias, options.format)
            rank = min(max_rank, max(options.rank_multiple, rank // options.rank_multiple * options.rank_multiple))
            dense = MatrixPlan(name, inputs, outputs, None, max_rank, before, before)
            matrices.append(_with_rank(dense, rank, options.format))
    now = sum(num_parameters(model.get_submodule(matrix.name)) for matrix in matrices)
    made = Plan(matrices, num_parameters(model) - now + sum(matrix.parameters_before for matrix in matrices))
    _check_reachable(made, now, options)
    return made


def _check_reachable(uniform: Plan, parameters_now: int, options: Compress) -> None:
    removed = 1 - parameters_now / uniform.mlp_parameters_before
    if options.reduction <= removed:
        raise UsageError(
            f"reduction is {options.reduction:g}, but {removed:.1%} of the dense MLP parameters are removed already: "
            "expected more"
        )
    if uniform.mlp_reduction < options.reduction - 1e-9:
        raise UsageError(
            f"reduction is {options.reduction:g}: with ranks in multiples of {options.rank_multiple} at most "
            f"{uniform.mlp_reduction:.1%} of the MLP parameters can be removed"
        )


def _num_bias(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return 0 if bias is None else bias.numel()


def _with_rank(matrix: MatrixPlan, rank: int | None, layer_format: str) -> MatrixPlan:
    dense = matrix.in_features * matrix.out_features
    weights = dense if rank is None else num_weights(matrix.in_features, matrix.out_features, rank, layer_format)
    return replace(matrix, rank=rank, parameters_after=matrix.parameters_before - dense + weights)


def choose(
    model: PreTrainedModel,
    uniform: Plan,
    projections: dict[str, Projection],
    options: Compress,
    probe: Probe | None,
) -> Plan:
    """The plan with the ranks that the options ask for and the damage predicted."""
    curvature = options.method == "two-sided"
    losses = {name: (found.lost() / 2).cpu().numpy() for name, found in projections.items()}  # KL = g^2/2
    chosen = uniform
    if options.ranks_from is not None:
        chosen = _read_ranks(uniform, Path(options.ranks_from), options)
    elif options.allocation == "energy":
        chosen = _allocate_energy(uniform, losses, options)
    elif options.allocation == "global":
        if curvature:
            chosen = _allocate_global(uniform, losses, options)
        if probe is not None:
            chosen = _measure(model, chosen, projections, losses, probe)
            for matrix in chosen.matrices:
                if matrix.probed_kl is not None and matrix.predicted_at_probed_rank:
                    losses[matrix.name] *= max(matrix.probed_kl, 0.0) / matrix.predicted_at_probed_rank
            chosen = _allocate_global(chosen, losses, options)
    known = curvature or (options.allocation == "global" and probe is not None)
    return _with_damage(chosen, projections, losses if known else None, options)


def _allocate_global(planned: Plan, losses: dict[str, np.ndarray], options: Compress) -> Plan:
    """Ranks that minimise the predicted loss of all matrices together; where full rank is best it stays dense."""
    curves = [_curve(matrix, losses[matrix.name], options, options.rank_floor) for matrix in planned.matrices]
    return _with_ranks(planned, allocate(curves, _budget(planned, options)), options)


def _allocate_energy(planned: Plan, losses: dict[str, np.ndarray], options: Compress) -> Plan:
    curves = [_curve(matrix, losses[matrix.name], options, 0.0) for matrix in planned.matrices]
    mlps = list(dict.fromkeys(_mlp_name(matrix) for matrix in planned.matrices))
    depths = [mlps.index(_mlp_name(matrix)) for matrix in planned.matrices]
    return _with_ranks(planned, allocate_energy(curves, depths, _budget(planned, options)), options)


def _mlp_name(matrix: MatrixPlan) -> str:
    return matrix.name.rpartition(".")[0]


def _curve(matrix: MatrixPlan, lost: np.ndarray, options: Compress, floor: float) -> Curve:
    """Cost and loss of the ranks that the options allow, from `floor` of the uniform rank on; the last one is the
    matrix as it is, where that is allowed."""
    inputs, outputs = matrix.in_features, matrix.out_features
    uniform = rank_for(inputs, outputs, (1 - options.reduction) * inputs * outputs, options.format)
    top = max(1, int(options.rank_cap * matrix.max_rank))
    multiple = options.rank_multiple
    ranks = np.arange(min(top, max(1, round(floor * uniform))), top + 1)
    ranks = ranks[ranks % multiple == 0] if top >= multiple else np.array([top])
    padded = np.zeros(matrix.max_rank + 1)  # a matrix may have fewer directions than its shape allows
    padded[: len(lost)] = lost[: matrix.max_rank + 1]
    costs = np.array([num_weights(inputs, outputs, int(rank), options.format) for rank in ranks])
    losses = padded[ranks]
    if options.rank_cap >= 1:
        is_dense = matrix.max_rank == min(inputs, outputs)
        kept = matrix.max_rank + 1 if is_dense else matrix.max_rank  # one above full rank stands for dense
        cost = inputs * outputs if is_dense else num_weights(inputs, outputs, kept, options.format)
        cheaper = costs < cost
        ranks, costs = np.append(ranks[cheaper], kept), np.append(costs[cheaper], cost)
        losses = np.append(losses[cheaper], 0.0)
    return Curve(ranks, costs, losses, float(padded[0]))


def _budget(planned: Plan, options: Compress) -> float:
    biases = planned.mlp_parameters_before - sum(m.in_features * m.out_features for m in planned.matrices)
    return (1 - options.reduction) * planned.mlp_parameters_before - biases


def _with_ranks(planned: Plan, ranks: Iterable[int], options: Compress) -> Plan:
    matrices = [
        _with_rank(matrix, None if rank > min(matrix.in_features, matrix.out_features) else rank, options.format)
        for matrix, rank in zip(planned.matrices, ranks, strict=True)
    ]
    allocated = replace(planned, matrices=matrices)
    if allocated.mlp_reduction < options.reduction - 1e-9:
        raise UsageError(
            f"reduction is {options.reduction:g}: with these rank_floor and rank_multiple at most "
            f"{allocated.mlp_reduction:.1%} of the MLP parameters can be removed"
        )
    return allocated


def _measure(
    model: PreTrainedModel,
    planned: Plan,
    projections: dict[str, Projection],
    losses: dict[str, np.ndarray],
    probe: Probe,
) -> Plan:
    """The plan with each matrix's true KL at its planned rank; a matrix that stays dense is probed a little below."""
    matrices = []
    for matrix in planned.matrices:
        highest = min(len(projections[matrix.name].energy), max(1, matrix.max_rank * 7 // 8))
        rank = min(matrix.rank or highest, highest)
        weight = linear_weight(model.get_submodule(matrix.name)).detach()
        measured = probe.of_one(matrix.name, projections[matrix.name].factors(weight, rank))
        predicted = float(losses[matrix.name][rank])
        matrices.append(replace(matrix, probed_rank=rank, probed_kl=measured, predicted_at_probed_rank=predicted))
    return replace(planned, matrices=matrices)


def _with_damage(
    planned: Plan, projections: dict[str, Projection], losses: dict[str, np.ndarray] | None, options: Compress
) -> Plan:
    """The plan with the damage predicted; a rank is lower where the matrix itself has fewer directions."""
    matrices = []
    for matrix in planned.matrices:
        projection = projections[matrix.name]
        if matrix.rank is None:
            matrices.append(replace(matrix, relative_error=0.0, predicted_kl=None if losses is None else 0.0))
            continue
        rank = min(matrix.rank, len(projection.energy))
        done = replace(_with_rank(matrix, rank, options.format), relative_error=projection.relative_error(rank))
        if losses is not None:
            done = replace(done, predicted_kl=float(losses[matrix.name][rank]))
        matrices.append(done)
    total = None if losses is None else sum(matrix.predicted_kl for matrix in matrices)
    return replace(planned, matrices=matrices, predicted_kl=total)


def _read_ranks(uniform: Plan, path: Path, options: Compress) -> Plan:
    """The ranks of an earlier plan's JSON; raises `DataError` when it is of another model."""
    found = files.read_json(path)
    try:
        ranks = {m["name"]: (m["in_features"], m["out_features"], m["rank"]) for m in found["matrices"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: expected an object with `matrices`, as in compressed/stage.json") from error
    matrices = []
    for matrix in uniform.matrices:
        inputs, outputs, rank = ranks.pop(matrix.name, (None, None, None))
        if (inputs, outputs) != (matrix.in_features, matrix.out_features):
            raise DataError(
                f"{path} is for another model: {matrix.name} is {matrix.out_features} x {matrix.in_features}, "
                f"there it is {'missing' if inputs is None else f'{outputs} x {inputs}'}"
            )
        dense = rank is None and matrix.max_rank == min(inputs, outputs)
        if not dense and not (type(rank) is int and 1 <= rank <= matrix.max_rank):
            raise DataError(f"{path}: rank {rank} of {matrix.name}: expected 1 to {matrix.max_rank}")
        matrices.append(_with_rank(matrix, rank, options.format))
    if ranks:
        raise DataError(f"{path} is for another model: this one has no {next(iter(ranks))}")
    return replace(uniform, matrices=matrices)
