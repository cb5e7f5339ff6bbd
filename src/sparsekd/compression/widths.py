"""How many neurons each MLP keeps, in numbers: the plan of the methods of form `width`.

A neuron is a row of each matrix that writes it, with its biases, and a column of the one that reads it, whose own bias
stays. One width for all MLPs needs the shapes alone, so a plan can be printed before a weight is read.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from sparsekd.compression.plan import MatrixPlan, Plan, require_form, require_more
from sparsekd.errors import UsageError
from sparsekd.models import MLP, find_mlps, forms, num_parameters, shape
from sparsekd.models.forms import width
from sparsekd.records import Record


def uniform(model: PreTrainedModel, reduction: float, multiple: int, method: str) -> Plan:
    """The largest one width, a multiple of `multiple`, that leaves at most `1 - reduction` of the dense model's MLP
    parameters. An MLP that is narrower already stays as it is.

    Works on a model without weights too, and on one that neurons were removed from before. Raises `UsageError` for a
    model of another form, for one that has no more parameters than that already, and for a reduction that multiples
    cannot reach.
    """
    require_form(model, ("width",), method)
    now = [line for mlp in find_mlps(model) for line in _as_it_is(model, mlp)]
    made = Plan(now, forms.dense_sizes(model).model, reduction)
    require_more(reduction, made.mlp_reduction)
    widest = max(line.neurons or 0 for line in now)
    if multiple > widest:
        raise UsageError(
            f"neurons are kept in multiples of {multiple}, but no MLP has more than {widest}: expected less"
        )
    widths = range(multiple, widest + 1, multiple)
    # the small term keeps a budget that is a whole number from losing a parameter to rounding
    budget = math.floor((1 - reduction) * made.mlp_parameters_before + 1e-6)
    found = bisect.bisect_right(widths, budget, key=lambda neurons: _with_width(made, neurons).mlp_parameters_after)
    if not found:
        most = _with_width(made, multiple).mlp_reduction
        raise UsageError(
            f"reduction is {reduction:g}: with neurons in multiples of {multiple} at most {most:.1%} of the MLP "
            "parameters can be removed"
        )
    return _with_width(made, widths[found - 1])


def plan_of(uniform: Plan, neurons: Mapping[str, int]) -> Plan:
    """The same plan with other widths, by the module that holds the matrices of an MLP."""
    lines = itertools.groupby(uniform.matrices, lambda line: line.name.rpartition(".")[0])
    return replace(uniform, matrices=[line for name, mlp in lines for line in _narrowed(list(mlp), neurons[name])])


def compared(plan: Record, method: str, allocation: str) -> str:
    """What the widths of a plan, as plain values, are predicted to give up, and what the other allocation's would; the
    plan must know both. MLPs that differed before it may still differ with `uniform`."""
    before = {line["in_features"] for line in plan["matrices"] if line["predicted_kl"] is not None}
    one = "one width, an ordinary checkpoint" if len(before) == 1 else "one width, but for MLPs that are narrower"
    kl = {name: f"{value:.3f}" for name, value in plan["predicted_kl_by_allocation"].items()}
    if allocation == "global":
        return (
            f"predicted KL {kl['global']} with a width a layer; {one}, would be {kl['uniform']} "
            f"(compress.{method}.allocation=uniform)"
        )
    return (
        f"predicted KL {kl['uniform']} with {one}; a width a layer would be {kl['global']} "
        f"(compress.{method}.allocation=global)"
    )


def _with_width(planned: Plan, neurons: int) -> Plan:
    """The plan with one width for all MLPs, but for those that are narrower."""
    names = {line.name.rpartition(".")[0]: line.neurons or 0 for line in planned.matrices}
    return plan_of(planned, {name: min(neurons, now) for name, now in names.items()})


def _narrowed(mlp: list[MatrixPlan], neurons: int) -> list[MatrixPlan]:
    """The lines of an MLP, of which the last one reads the neurons, with so many of them."""
    *writing, reading = mlp
    now = reading.neurons
    assert now is not None
    after = [line.parameters_after // now * neurons for line in writing]
    after.append(reading.parameters_after + (neurons - now) * reading.out_features)
    return [replace(line, neurons=neurons, parameters_after=n) for line, n in zip(mlp, after, strict=True)]


def _as_it_is(model: PreTrainedModel, mlp: MLP) -> list[MatrixPlan]:
    """The lines of an MLP without a change; before, it was the dense model's."""
    lines = []
    now, dense = shape(model.get_submodule(mlp.output))[0], width.dense_neurons(model, mlp)
    for name in mlp.matrices:
        module = model.get_submodule(name)
        inputs, outputs = shape(module)
        after = num_parameters(module)
        more = outputs * (dense - now) if name == mlp.output else after // now * (dense - now)
        lines.append(MatrixPlan(name, inputs, outputs, None, min(inputs, outputs), after + more, after, neurons=now))
    return lines
