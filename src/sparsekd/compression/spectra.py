"""How much of each MLP matrix is used: spectra, effective ranks, and what a truncation would cost.

The paper calls the unused part structural slack. A weight's own singular values show little of it, because
directions that never carry anything look like any other; the spectrum of the outputs on real text shows it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression.calibration import Calibration
from sparsekd.compression.methods import method_named
from sparsekd.compression.methods._lowrank import LowRank
from sparsekd.device import in_float64, solver_device
from sparsekd.errors import UsageError
from sparsekd.models import linear_weight
from sparsekd.recipe import Compress
from sparsekd.records import Record


@dataclass(frozen=True)
class Spectrum:
    """One matrix. `energy` is what the method's directions carry, descending, as shares of their sum."""

    name: str
    in_features: int
    out_features: int
    singular_values: list[float]  # of the weight
    weight_effective_rank: float
    energy: list[float]
    effective_rank: float  # of the energy: how many equal directions would carry it
    rank: int  # that a uniform cut leaves
    relative_error: float  # energy that this cut loses
    predicted_kl: float | None  # nats a token, by curvature; None for the methods without


def spectra_of(model: PreTrainedModel, calibration: Calibration, section: Compress) -> list[Spectrum]:
    """The spectrum of every MLP matrix in depth order, by the section's method and for its reduction."""
    method = low_rank_method(section)
    planned = method.plan(model, section.reduction, section.options)
    found = method.directions_of(model, calibration)
    result = []
    for matrix in planned.matrices:
        projection = found[matrix.name]
        weight = linear_weight(model.get_submodule(matrix.name)).detach().float()
        singular = torch.linalg.svdvals(weight.to(solver_device(weight.device)))
        rank = min(matrix.rank or matrix.max_rank, len(projection.energy))
        lost = float(projection.lost()[rank])
        result.append(
            Spectrum(
                matrix.name,
                matrix.in_features,
                matrix.out_features,
                singular.tolist(),
                effective_rank(singular.square()),
                (projection.energy / projection.energy.sum().clamp_min(1e-300)).tolist(),
                effective_rank(projection.energy),
                rank,
                projection.relative_error(rank),
                lost / 2 if method.curvature else None,
            )
        )
    return result


def low_rank_method(section: Compress) -> LowRank:
    """The section's method; raises `UsageError` for one without directions."""
    method = method_named(section.method)
    if not isinstance(method, LowRank):
        raise UsageError(
            f"compress.method is {section.method}, which has no directions: a spectrum is of another method"
        )
    return method


def effective_rank(energy: Float[Tensor, " K"]) -> float:
    """`exp` of the entropy of the energy's distribution (Roy and Vetterli 2007, there of singular values)."""
    energy = in_float64(energy)
    share = energy.clamp_min(0) / energy.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


def as_dict(spectra: list[Spectrum], section: Compress) -> Record:
    """Plain values for JSON."""
    return {
        "method": section.method,
        "reduction": section.reduction,
        "num_tokens": section.num_tokens,
        "matrices": [asdict(one) for one in spectra],
    }
