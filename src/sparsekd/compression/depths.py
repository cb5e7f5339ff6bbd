"""Which decoder layers go, in numbers: the plan of the methods of form `depth`.

A layer goes whole: its MLP, which `reduction` counts, and with it attention and norms. How many go is the nearest count
to the reduction that is asked for. It needs the shapes alone, so a plan can be printed before a weight is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from sparsekd.compression.plan import MatrixPlan, Plan, require_form, require_more
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_layers, find_mlps, forms, list_of_layers, mlp_parameters, num_parameters, shape
from sparsekd.models.forms import depth


def nearest(model: PreTrainedModel, reduction: float, method: str) -> Plan:
    """The plan with as many layers less as make the reduction nearest to what is asked; of two counts as near, the
    larger. Which layers go, the text decides: here the last ones stand for them.

    Works on a model without weights too, and on one that layers were removed from before. Raises `UsageError` for a
    model of another form, for one that the base cannot open with so few layers, and for a reduction nearest to which is
    the model as it is, or one without layers.
    """
    require_form(model, ("depth",), method)
    now = without(model, reduction, ())
    require_more(reduction, now.mlp_reduction)
    count = len(find_layers(model))
    plans = [without(model, reduction, range(count - gone, count)) for gone in range(1, count)]
    shares = [now.mlp_reduction, *(plan.mlp_reduction for plan in plans), 1.0]
    # rounded, or two counts are not as near as each other
    chosen = min(range(len(shares)), key=lambda gone: (round(abs(shares[gone] - reduction), 9), -gone))
    if not 0 < chosen < count:
        possible = f"{shares[1]:.1%} to {shares[-2]:.1%} of the MLP parameters" if plans else "nothing more"
        raise UsageError(
            f"reduction is {reduction:g}, but whole decoder layers are removed, of which the model has {count} and one "
            f"has to stay: {possible} can be removed"
        )
    left = count - chosen
    depth.tried(model, [round(one * (count - 1) / max(1, left - 1)) for one in range(left)])  # evenly, with both ends
    return plans[chosen - 1]


def num_removed(planned: Plan, model: PreTrainedModel) -> int:
    """How many layers of the model go."""
    gone = {line.name for line in planned.matrices if not line.parameters_after}
    return sum(mlp.output in gone for mlp in find_mlps(model))


def remove(model: PreTrainedModel, planned: Plan, numbers: Collection[int], scores: Mapping[int, float]) -> Plan:
    """Removes the layers of these numbers, in place, all or none; returns the plan of them, with the `scores` of all
    layers by which they were chosen. Errors as in `forms.depth.keep`."""
    name, count = list_of_layers(model), len(find_layers(model))
    done = without(model, planned.reduction, numbers)
    depth.keep(model, [number for number in range(count) if number not in numbers])
    return replace(done, layer_scores={f"{name}.{number}": score for number, score in sorted(scores.items())})


def require_finite(model: PreTrainedModel, scores: Mapping[int, float]) -> None:
    """Raises `DataError` naming the first layer whose score is no number."""
    for number, score in scores.items():
        if not math.isfinite(score):
            name = f"{list_of_layers(model)}.{number}"
            raise DataError(f"what {name} makes of the text is not finite: the model's weights are damaged")


def without(model: PreTrainedModel, reduction: float, numbers: Collection[int]) -> Plan:
    """The plan of the model without its layers of these numbers."""
    dense, layers = forms.dense_sizes(model), find_layers(model)
    by_layer = [[_line(model, name) for name in mlp.matrices] for mlp in find_mlps(model)]
    gone_before = dense.mlp - mlp_parameters(model)
    others = num_parameters(model) - mlp_parameters(model)
    for number in numbers:
        others -= num_parameters(layers[number]) - sum(line.parameters_before for line in by_layer[number])
        by_layer[number] = [replace(line, parameters_after=0) for line in by_layer[number]]
    lines = list(itertools.chain(*by_layer))
    return Plan(lines, dense.model, reduction, other_parameters_after=others, mlp_parameters_gone=gone_before)


def _line(model: PreTrainedModel, name: str) -> MatrixPlan:
    """A matrix that stays as it is."""
    module = model.get_submodule(name)
    inputs, outputs = shape(module)
    parameters = num_parameters(module)
    return MatrixPlan(name, inputs, outputs, None, min(inputs, outputs), parameters, parameters)
