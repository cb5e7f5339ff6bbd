"""MLPs with fewer neurons: those of the highest scores as they are, or, what the method `neurons` does, chosen and
compensated in the metric of the KL.

1. The curvature G of the KL at every MLP's output, by one backward pass.
2. The dense model layer by layer: the second moment of a layer's neurons says in which order they go and what each
   width costs (`removal.py`). Of these curves one budget is divided over the layers, or all get one width.
3. Once more layer by layer, in the model that is narrower up to there: the kept neurons take over what the layer wrote,
   on the inputs as they have become, and `CORRECTION` of what the layers before have changed in the residual stream.

Shape letters: I neurons, K kept neurons, H hidden size, A = I + 1 with a neuron that is always 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import widths
from sparsekd.compression.allocation import Curve, allocate
from sparsekd.compression.calibration import Calibration
from sparsekd.compression.directions import regularised
from sparsekd.compression.methods.neurons import Options
from sparsekd.compression.plan import Plan
from sparsekd.compression.removal import Removal, refitted, removal
from sparsekd.compression.statistics import Gram, weights_of
from sparsekd.compression.walk import Walk
from sparsekd.device import add_over_processes, in_float64, rounded_factors, solver_device
from sparsekd.errors import DataError
from sparsekd.models import MLP, find_mlps, linear_weight, num_parameters, shape
from sparsekd.models.forms import width

_CURVATURE_TOKENS = 32  # for each dimension of G, the pass that takes longest; more made no difference that was seen
_LEAST = 0.1  # of its neurons that a layer keeps
CORRECTION = 0.5  # none and all of it were measured to be worse
_RIDGE = 1e-2  # of the refit; the sample says less of what is left of the residual stream than of the neurons


@dataclass
class _Moments:
    """Sums over tokens, on the solver's device in float64."""

    gram: Float[Tensor, "A A"]  # of the neurons
    cross: Float[Tensor, "H A"]  # of what the outputs lack with the neurons

    @classmethod
    def none_yet(cls, neurons: int, hidden: int, device: torch.device) -> _Moments:
        size = neurons + 1
        return cls(
            torch.zeros(size, size, dtype=torch.float64, device=device),
            torch.zeros(hidden, size, dtype=torch.float64, device=device),
        )

    def add(self, neurons: Float[Tensor, "N I"], missing: Float[Tensor, "N H"] | None = None) -> None:
        weights = weights_of(neurons)
        rows = torch.cat([neurons, torch.ones_like(weights)], dim=1) * weights
        with rounded_factors():
            self.gram += (rows.T @ rows).to(self.gram)
            if missing is not None:
                self.cross += ((missing * weights).T @ rows).to(self.cross)

    def add_processes(self) -> None:
        """Makes the sums those of all processes."""
        for value in (self.gram, self.cross):
            add_over_processes(value)

    def solved(self, centred: bool) -> tuple[Float[Tensor, "I I"], Float[Tensor, "H I"]]:
        """`E[z z^T]` and `E[e z^T]`; `centred` around the means, which a bias takes care of."""
        count = self.gram[-1, -1]
        gram, cross = self.gram[:-1, :-1] / count, self.cross[:, :-1] / count
        if centred:
            mean = self.gram[:-1, -1] / count
            gram, cross = gram - mean.outer(mean), cross - (self.cross[:, -1] / count).outer(mean)
        return gram, cross

    def means(self) -> tuple[Float[Tensor, " I"], Float[Tensor, " H"]]:
        """Of the neurons and of what the outputs lack."""
        return self.gram[:-1, -1] / self.gram[-1, -1], self.cross[:, -1] / self.gram[-1, -1]


def narrow(model: PreTrainedModel, planned: Plan, calibration: Calibration, options: Options) -> Plan:
    """Takes neurons out of all MLPs, in place, all or nothing; returns the plan with the widths and what they cost.

    Raises `DataError` for neurons that are not finite, or all zero.
    """
    removals = removals_of(model, calibration)
    chosen = divided(model, planned, removals, options.multiple)[options.allocation]
    neurons = {line.name: line.neurons or 0 for line in chosen.matrices}
    kept = {mlp: found.kept(neurons[mlp.output]).cpu() for mlp, found in removals.items()}
    width.keep(model, kept, *compensated(model, kept, calibration.walk()))
    return chosen


def keep_highest(model: PreTrainedModel, planned: Plan, scores: Mapping[MLP, Float[Tensor, " I"]]) -> None:
    """Leaves every MLP the planned number of neurons, those of the highest scores, as they are, in place, all or
    nothing; of equal scores the first. Errors as in `narrow`."""
    neurons = {line.name: line.neurons or 0 for line in planned.matrices}
    kept, outputs = {}, {}
    for mlp, importance in scores.items():
        _check(importance, mlp)
        order = importance.sort(descending=True, stable=True).indices.cpu()
        kept[mlp] = order[: neurons[mlp.output]].sort().values
        outputs[mlp] = linear_weight(model.get_submodule(mlp.output)).detach()[:, kept[mlp]]
    width.keep(model, kept, outputs, {})


def removals_of(model: PreTrainedModel, calibration: Calibration) -> dict[MLP, Removal]:
    """In which order the neurons of each MLP go and what that costs, in the model as it is; errors as in `narrow`."""
    metrics = calibration.output_curvature(_CURVATURE_TOKENS * model.config.get_text_config().hidden_size)
    walk = calibration.walk()
    return {mlp: _removal_of(model, mlp, metrics.pop(mlp), walk, layer) for layer, mlp in enumerate(find_mlps(model))}


def divided(model: PreTrainedModel, planned: Plan, removals: Mapping[MLP, Removal], multiple: int) -> dict[str, Plan]:
    """A plan for each allocation, with what its widths are predicted to cost; `planned` has one width."""
    curves = [_curve(model, mlp, found, multiple) for mlp, found in removals.items()]
    fixed = sum(num_parameters(model.get_submodule(mlp.output)) for mlp in removals) - sum(
        linear_weight(model.get_submodule(mlp.output)).numel() for mlp in removals
    )
    by_layer = allocate(curves, (1 - planned.reduction) * planned.mlp_parameters_before - fixed)
    names = (mlp.output.rpartition(".")[0] for mlp in removals)
    plans = {"global": widths.plan_of(planned, dict(zip(names, by_layer, strict=True))), "uniform": planned}
    plans = {allocation: _with_losses(plan, removals) for allocation, plan in plans.items()}
    both = {allocation: plan.predicted_kl or 0.0 for allocation, plan in plans.items()}
    return {allocation: replace(plan, predicted_kl_by_allocation=both) for allocation, plan in plans.items()}


def _removal_of(model: PreTrainedModel, mlp: MLP, metric: Gram, walk: Walk, layer: int) -> Removal:
    module = model.get_submodule(mlp.output)
    neurons, hidden = shape(module)
    device = solver_device(walk.device)
    moments = _Moments.none_yet(neurons, hidden, device)
    for values, _ in walk.step(layer):
        moments.add(values)
    moments.add_processes()
    gram, _ = moments.solved(centred=_has_bias(model, mlp))
    _check(gram.diagonal(), mlp)
    weight = in_float64(linear_weight(module).detach()).to(device)
    return removal(weight, gram, regularised(metric.mean(walk.device)))


def _check(importance: Float[Tensor, " I"], mlp: MLP) -> None:
    if not bool(torch.isfinite(importance).all()):
        raise DataError(f"the neurons that {mlp.output} reads are not finite: the model's weights are damaged")
    if not bool((importance > 0).any()):
        raise DataError(
            f"the neurons that {mlp.output} reads are zero on all of the text: expected a trained model, or other text"
        )


def _has_bias(model: PreTrainedModel, mlp: MLP) -> bool:
    return getattr(model.get_submodule(mlp.output), "bias", None) is not None


def _curve(model: PreTrainedModel, mlp: MLP, found: Removal, multiple: int) -> Curve:
    """Cost and loss of each width that is a multiple, and of the MLP as it is."""
    now = len(found.order)
    first = max(multiple, round(_LEAST * now / multiple) * multiple)
    kept = np.append(np.arange(first, now, multiple), now)
    inputs = sum(num_parameters(model.get_submodule(name)) for name in mlp.inputs)
    cost = inputs // now + shape(model.get_submodule(mlp.output))[1]
    return Curve(kept, kept * cost, found.losses.cpu().numpy()[now - kept])


def _with_losses(planned: Plan, removals: Mapping[MLP, Removal]) -> Plan:
    """The plan with the predicted loss of each MLP, in the line of its output matrix, and of all of them."""
    losses = {mlp.output: found.losses for mlp, found in removals.items()}
    lines = [
        replace(line, predicted_kl=float(losses[line.name][line.in_features - (line.neurons or 0)]))
        if line.name in losses
        else line
        for line in planned.matrices
    ]
    return replace(planned, matrices=lines, predicted_kl=sum(line.predicted_kl or 0.0 for line in lines))


@torch.no_grad()
def compensated(
    model: PreTrainedModel, kept: Mapping[MLP, Tensor], dense: Walk, correction: float = CORRECTION
) -> tuple[dict[MLP, Float[Tensor, "H K"]], dict[MLP, Float[Tensor, " H"]]]:
    """The output matrices for the kept neurons, and their biases. While this is worked out the removed neurons'
    columns are zero in the model; it is put back."""
    narrowed = dense.copy()
    outputs, biases, old = {}, {}, {}
    share = correction if dense.hidden and dense.adds_its_mlp(0) else 0.0
    try:
        for layer, (mlp, neurons) in enumerate(kept.items()):
            module = model.get_submodule(mlp.output)
            weight, bias = linear_weight(module).detach(), getattr(module, "bias", None)
            matrix, shift = _refit(weight, neurons, _seen(weight, dense, narrowed, layer, share), bias is not None)
            old[weight] = weight.clone()
            weight.zero_()
            weight[:, neurons.to(weight.device)] = outputs[mlp] = matrix.to(weight)
            if bias is not None:
                old[bias.detach()] = bias.detach().clone()
                bias += shift.to(bias)
                biases[mlp] = bias.detach().clone()
            narrowed.pass_through(layer)  # with the matrix as it is now
    finally:
        for value, before in old.items():
            value.copy_(before)
    return outputs, biases


def _seen(weight: Tensor, dense: Walk, narrowed: Walk, layer: int, share: float) -> _Moments:
    """Moments of a layer's neurons in the narrowed model, with `share` of what its output lacks to the dense one's."""
    moments = _Moments.none_yet(weight.shape[1], weight.shape[0], solver_device(dense.device))
    if share:
        for (values, output), (_, wanted) in zip(narrowed.look(layer), dense.step(layer), strict=True):
            moments.add(values, share * (wanted - output))
    else:
        for values, _ in narrowed.look(layer):
            moments.add(values)
    moments.add_processes()
    return moments


def _refit(
    weight: Float[Tensor, "H I"], neurons: Tensor, moments: _Moments, has_bias: bool
) -> tuple[Float[Tensor, "H K"], Float[Tensor, " H"]]:
    """The output matrix of the kept neurons, and what its bias has to be changed by."""
    gram, cross = moments.solved(centred=has_bias)
    full, chosen = in_float64(weight).to(gram.device), neurons.to(gram.device)
    target = full @ gram[:, chosen] + cross[:, chosen]
    matrix = refitted(target, gram[chosen[:, None], chosen], full[:, chosen], _RIDGE)
    mean, missing = moments.means()
    return matrix, full @ mean + missing - matrix @ mean[chosen]
