"""Which rank each matrix gets, and what that is predicted to cost: the plan of the low-rank methods.

Uniform ranks need the shapes alone, so a plan can be printed before a weight is read. The others weigh matrices by
their energy (the paper's tiers), by curvature, or by the KL that the probe measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from sparsekd import files
from sparsekd.compression.allocation import Curve, allocate, allocate_energy
from sparsekd.compression.directions import Projection
from sparsekd.compression.methods._lowrank import Options
from sparsekd.compression.plan import MatrixPlan, Plan, require_more
from sparsekd.compression.probe import Probe
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps, linear_weight, num_parameters, shape
from sparsekd.models.forms import lowrank


def uniform(model: PreTrainedModel, reduction: float, options: Options) -> Plan:
    """Uniform ranks: every matrix loses the same fraction of its weights. Works on a model without weights too."""
    matrices, compressed = [], lowrank.compressed_layers(model)
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            module = model.get_submodule(name)
            inputs, outputs = shape(module)
            bias = _num_bias(module)
            before = inputs * outputs + bias
            max_rank = compressed[name].rank if name in compressed else min(inputs, outputs)
            rank = lowrank.rank_for(inputs, outputs, (1 - reduction) * before - bias, options.format)
            rank = min(max_rank, max(options.rank_multiple, rank // options.rank_multiple * options.rank_multiple))
            dense = MatrixPlan(name, inputs, outputs, None, max_rank, before, before)
            matrices.append(_with_rank(dense, rank, options.format))
    now = sum(num_parameters(model.get_submodule(matrix.name)) for matrix in matrices)
    dense_mlps = sum(matrix.parameters_before for matrix in matrices)
    made = Plan(matrices, num_parameters(model) - now + dense_mlps, reduction)
    _check_reachable(made, now, options)
    return made


def _check_reachable(uniform: Plan, parameters_now: int, options: Options) -> None:
    require_more(uniform.reduction, 1 - parameters_now / uniform.mlp_parameters_before)
    if uniform.mlp_reduction < uniform.reduction - 1e-9:
        raise UsageError(
            f"reduction is {uniform.reduction:g}: with ranks in multiples of {options.rank_multiple} at most "
            f"{uniform.mlp_reduction:.1%} of the MLP parameters can be removed"
        )


def _num_bias(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return 0 if bias is None else bias.numel()


def _with_rank(matrix: MatrixPlan, rank: int | None, layer_format: str) -> MatrixPlan:
    dense = matrix.in_features * matrix.out_features
    weights = (
        dense if rank is None else lowrank.num_weights(matrix.in_features, matrix.out_features, rank, layer_format)
    )
    return replace(matrix, rank=rank, parameters_after=matrix.parameters_before - dense + weights)


def choose(
    model: PreTrainedModel,
    uniform: Plan,
    projections: dict[str, Projection],
    options: Options,
    probe: Probe | None,
    curvature: bool,
) -> Plan:
    """The plan with the ranks that the options ask for and the damage predicted; with `curvature` the projections'
    energies are KL, times two."""
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


def _allocate_global(planned: Plan, losses: dict[str, np.ndarray], options: Options) -> Plan:
    """Ranks that minimise the predicted loss of all matrices together; where full rank is best it stays dense."""
    curves = [_curve(planned, matrix, losses[matrix.name], options, options.rank_floor) for matrix in planned.matrices]
    return _with_ranks(planned, allocate(curves, _budget(planned)), options)


def _allocate_energy(planned: Plan, losses: dict[str, np.ndarray], options: Options) -> Plan:
    curves = [_curve(planned, matrix, losses[matrix.name], options, 0.0) for matrix in planned.matrices]
    mlps = list(dict.fromkeys(_mlp_name(matrix) for matrix in planned.matrices))
    depths = [mlps.index(_mlp_name(matrix)) for matrix in planned.matrices]
    return _with_ranks(planned, allocate_energy(curves, depths, _budget(planned)), options)


def _mlp_name(matrix: MatrixPlan) -> str:
    return matrix.name.rpartition(".")[0]


def _curve(planned: Plan, matrix: MatrixPlan, lost: np.ndarray, options: Options, floor: float) -> Curve:
    """Cost and loss of the ranks that the options allow, from `floor` of the uniform rank on; the last one is the
    matrix as it is, where that is allowed."""
    inputs, outputs = matrix.in_features, matrix.out_features
    uniform = lowrank.rank_for(inputs, outputs, (1 - planned.reduction) * inputs * outputs, options.format)
    top = max(1, int(options.rank_cap * matrix.max_rank))
    multiple = options.rank_multiple
    ranks = np.arange(min(top, max(1, round(floor * uniform))), top + 1)
    ranks = ranks[ranks % multiple == 0] if top >= multiple else np.array([top])
    padded = np.zeros(matrix.max_rank + 1)  # a matrix may have fewer directions than its shape allows
    padded[: len(lost)] = lost[: matrix.max_rank + 1]
    costs = np.array([lowrank.num_weights(inputs, outputs, int(rank), options.format) for rank in ranks])
    losses = padded[ranks]
    if options.rank_cap >= 1:
        is_dense = matrix.max_rank == min(inputs, outputs)
        kept = matrix.max_rank + 1 if is_dense else matrix.max_rank  # one above full rank stands for dense
        cost = inputs * outputs if is_dense else lowrank.num_weights(inputs, outputs, kept, options.format)
        cheaper = costs < cost
        ranks, costs = np.append(ranks[cheaper], kept), np.append(costs[cheaper], cost)
        losses = np.append(losses[cheaper], 0.0)
    return Curve(ranks, costs, losses, float(padded[0]))


def _budget(planned: Plan) -> float:
    biases = planned.mlp_parameters_before - sum(m.in_features * m.out_features for m in planned.matrices)
    return (1 - planned.reduction) * planned.mlp_parameters_before - biases


def _with_ranks(planned: Plan, ranks: Iterable[int], options: Options) -> Plan:
    matrices = [
        _with_rank(matrix, None if rank > min(matrix.in_features, matrix.out_features) else rank, options.format)
        for matrix, rank in zip(planned.matrices, ranks, strict=True)
    ]
    allocated = replace(planned, matrices=matrices)
    if allocated.mlp_reduction < allocated.reduction - 1e-9:
        raise UsageError(
            f"reduction is {allocated.reduction:g}: with these rank_floor and rank_multiple at most "
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
    planned: Plan, projections: dict[str, Projection], losses: dict[str, np.ndarray] | None, options: Options
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


def _read_ranks(uniform: Plan, path: Path, options: Options) -> Plan:
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
