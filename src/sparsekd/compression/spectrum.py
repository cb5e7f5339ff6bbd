"""How much of each MLP matrix is used: spectra, effective ranks, and what a truncation would cost.

The paper calls the unused part structural slack. A weight's own singular values show little of it, because
directions that never carry anything look like any other; the spectrum of the outputs on real text shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import ranks
from sparsekd.compression.directions import directions_of
from sparsekd.device import in_float64, solver_device
from sparsekd.errors import UsageError
from sparsekd.models import linear_weight
from sparsekd.recipe import Compress


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


def spectrum(
    model: PreTrainedModel,
    blocks: Iterable[Int[Tensor, "_ _"]],
    options: Compress,
    *,
    seed: int = 42,
    separator: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> list[Spectrum]:
    """The spectrum of every MLP matrix in depth order, on `blocks`, by `options.method` and for `options.reduction`."""
    if options.method == "wanda":
        raise UsageError("compress.method is wanda, which has no directions: a spectrum is of another method")
    planned = ranks.plan(model, options)
    found = directions_of(model, list(blocks), options.method, seed=seed, separator=separator, warn=warn)
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
                lost / 2 if options.method == "two-sided" else None,
            )
        )
    return result


def effective_rank(energy: Float[Tensor, " K"]) -> float:
    """`exp` of the entropy of the energy's distribution (Roy and Vetterli 2007, there of singular values)."""
    energy = in_float64(energy)
    share = energy.clamp_min(0) / energy.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


def as_dict(spectra: list[Spectrum], options: Compress) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "method": options.method,
        "reduction": options.reduction,
        "num_tokens": options.num_tokens,
        "matrices": [asdict(one) for one in spectra],
    }
