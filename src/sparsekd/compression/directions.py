"""From token blocks to the important directions of every MLP matrix: statistics, then the method's solver."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import statistics
from sparsekd.compression.lowrank import Projection, from_input_gram, from_output_gram
from sparsekd.device import solver_device
from sparsekd.errors import UsageError
from sparsekd.models import MLP, find_mlps, linear_weight


def directions_of(
    model: PreTrainedModel,
    batches: list[Tensor],
    method: str,
    *,
    seed: int = 42,
    device: torch.device | None = None,
    separator: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Projection]:
    """The directions of every MLP matrix by its name, most important first, from the statistics the method needs.

    `device` and `separator` as in `statistics.collect`. Raises `UsageError` for fewer tokens than the hidden size has
    dimensions; `warn` hears of too few.
    """
    moments: dict[MLP, statistics.Moments] = {}
    two_sided = method == "two-sided"
    if method != "svd":
        _check_tokens(sum(batch.numel() for batch in batches), model, warn)
        moments = statistics.collect(model, batches, curvature=two_sided, seed=seed, device=device, separator=separator)
    projections = {}
    for mlp in find_mlps(model):
        seen = moments.pop(mlp, None)
        for name in mlp.matrices:
            weight = linear_weight(model.get_submodule(name)).detach()
            where = solver_device(weight.device)
            if seen is None:
                projections[name] = from_input_gram(weight, None)
            elif name == mlp.output:
                curvature = seen.output_curvature.mean().to(where) if two_sided else None
                projections[name] = from_output_gram(seen.output.mean().to(where), curvature)
            else:
                curvature = seen.input_curvature[name].mean().to(where) if two_sided else None
                gram = seen.input.mean().to(where)
                projections[name] = from_input_gram(weight, gram, curvature)
    return projections


def _check_tokens(num_tokens: int, model: PreTrainedModel, warn: Callable[[str], None]) -> None:
    hidden = model.config.get_text_config().hidden_size
    enough = statistics.TOKENS_PER_DIMENSION * hidden  # below it the statistics are fitted to the sample
    found = f"statistics of {hidden} dimensions from {num_tokens} tokens"
    if num_tokens < hidden:
        raise UsageError(f"{found}: expected at least {hidden}, better {enough}")
    if num_tokens < enough:
        warn(f"{found}: at least {enough} are advised")
