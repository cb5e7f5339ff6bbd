"""What each width of each MLP is predicted to cost: for the method `neurons` what spectra are for low rank.

A curve that stays low for long is of an MLP with neurons to spare. `global` divides the budget so that a parameter
saves as much in one MLP as in any other; how far its sum lies below that of one width is what a width a layer is worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from transformers import PreTrainedModel

from sparsekd.compression import narrowing
from sparsekd.compression.calibration import Calibration
from sparsekd.compression.methods import method_named
from sparsekd.recipe import Compress
from sparsekd.records import Record


@dataclass(frozen=True)
class Damage:
    """One MLP in the model as it is. KL is to that model, in nats a token, with this MLP alone narrowed and its other
    neurons fitted again; by curvature, so a large one is only a sign of a large one."""

    name: str  # of the matrix that reads the neurons
    neurons: int
    kept: list[int]  # ascending: the multiples, from none to all
    predicted_kl: list[float]  # at each of them
    neurons_by_allocation: dict[str, int]  # the widths that the section's reduction gives it
    predicted_kl_by_allocation: dict[str, float]  # at these


def damage_of(model: PreTrainedModel, calibration: Calibration, section: Compress) -> list[Damage]:
    """The damage of every MLP in depth order, and its widths for the section's reduction; the method is `neurons`. The
    model stays as it is. Raises what the method raises."""
    options = section.options
    planned = method_named(section.method).plan(model, section.reduction, options)
    removals = narrowing.removals_of(model, calibration)
    plans = narrowing.divided(model, planned, removals, options.multiple)
    lines = {allocation: {line.name: line for line in plan.matrices} for allocation, plan in plans.items()}
    result = []
    for mlp, found in removals.items():
        neurons = len(found.order)
        kept = np.append(np.arange(0, neurons, options.multiple), neurons)
        own = {allocation: by_name[mlp.output] for allocation, by_name in lines.items()}
        result.append(
            Damage(
                mlp.output,
                neurons,
                kept.tolist(),
                found.losses.cpu().numpy()[neurons - kept].tolist(),
                {allocation: line.neurons or 0 for allocation, line in own.items()},
                {allocation: line.predicted_kl or 0.0 for allocation, line in own.items()},
            )
        )
    return result


def as_dict(found: list[Damage], section: Compress) -> Record:
    """Plain values for JSON, with the sums over all MLPs."""
    return {
        "method": section.method,
        "reduction": section.reduction,
        "num_tokens": section.num_tokens,
        "predicted_kl_by_allocation": {
            allocation: sum(one.predicted_kl_by_allocation[allocation] for one in found)
            for allocation in found[0].predicted_kl_by_allocation
        },
        "mlps": [asdict(one) for one in found],
    }
