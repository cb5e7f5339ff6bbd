"""The plan of the structural step: what happens to each matrix, in numbers that every method fills in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedModel

from sparsekd.errors import UsageError
from sparsekd.models import forms
from sparsekd.records import Record


@dataclass(frozen=True)
class MatrixPlan:
    """What happens to one matrix: parameters are counted with its bias. A rank of None leaves it dense.

    Losses are KL to the model as it was, in nats per token, of a truncation of this matrix alone. Pruned weights are
    not counted as parameters, though `zeros` of them stay in the dense matrix.
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
    neurons: int | None = None  # left of the MLP that the matrix belongs to; form `width`


@dataclass(frozen=True)
class Plan:
    """The structural step in numbers: a line for each matrix, and the reduction of the MLPs and of the whole model."""

    matrices: list[MatrixPlan]
    model_parameters_before: int  # of the dense model
    reduction: float  # that was asked for
    predicted_kl: float | None = None  # the sum over the matrices; on other text it is more
    predicted_kl_by_allocation: dict[str, float] | None = None  # where a method knows of more than one
    measured_kl: float | None = None  # of all matrices together, on the probe's tokens
    other_parameters_after: int | None = None  # outside of the MLP matrices; None: as before
    mlp_parameters_gone: int = 0  # of the dense model, in layers that were removed before: they have no line
    layer_scores: dict[str, float] | None = None  # of every layer: what those that go were chosen by; form `depth`

    @property
    def mlp_parameters_before(self) -> int:
        return self.mlp_parameters_gone + sum(matrix.parameters_before for matrix in self.matrices)

    @property
    def mlp_parameters_after(self) -> int:
        return sum(matrix.parameters_after for matrix in self.matrices)

    @property
    def model_parameters_after(self) -> int:
        others = self.other_parameters_after
        if others is None:
            others = self.model_parameters_before - self.mlp_parameters_before
        return others + self.mlp_parameters_after

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

    def as_dict(self) -> Record:
        names = ("parameters_before", "parameters_after", "reduction")
        totals = {f"{part}_{name}": getattr(self, f"{part}_{name}") for part in ("mlp", "model") for name in names}
        totals["model_parameters_stored"] = self.model_parameters_stored
        losses = ("predicted_kl", "predicted_kl_by_allocation", "measured_kl", "layer_scores")
        found = {name: getattr(self, name) for name in losses}
        return totals | found | {"matrices": [asdict(matrix) for matrix in self.matrices]}


def combined(plans: Sequence[Plan], reduction: float) -> Plan:
    """The plans of steps, one after the other, as one; `reduction` is that of all. What the steps were predicted to
    lose is not known of several together."""
    return functools.reduce(lambda one, other: _both(one, other, reduction), plans)


def _both(first: Plan, second: Plan, reduction: float) -> Plan:
    """The matrices of the second are those that the first has left, in the same order."""
    left = iter(second.matrices)
    lines = []
    for before in first.matrices:
        if before.parameters_after:
            after = next(left)
            kept = after.neurons if before.neurons is None else before.neurons
            made = {"name": before.name, "parameters_before": before.parameters_before, "neurons": kept}
            lines.append(replace(after, **made))
        else:
            lines.append(before)
    others = second.model_parameters_after - second.mlp_parameters_after
    return replace(
        first,
        matrices=lines,
        reduction=reduction,
        other_parameters_after=others,
        predicted_kl=None,
        measured_kl=None,
        predicted_kl_by_allocation=None,
    )


def require_form(model: PreTrainedModel, allowed: tuple[str, ...], method: str) -> None:
    """Raises `UsageError` for a compressed model that is of no `allowed` form: such a one cannot be cut further."""
    described = forms.description_of(model)
    if described is not None and described.form not in allowed:
        raise UsageError(
            f"compress.method is {method}, but {next(iter(described.layers))} is {described.form} already: prune the "
            "dense model instead"
        )


def require_more(reduction: float, removed: float) -> None:
    """Raises `UsageError` for a reduction that the model, of which a share is `removed`, has already."""
    if reduction <= removed:
        raise UsageError(
            f"reduction is {reduction:g}, but {removed:.1%} of the dense MLP parameters are removed already: "
            "expected more"
        )
