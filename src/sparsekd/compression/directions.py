"""From token blocks to the important directions of every MLP matrix: statistics, then the method's solver."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.compression import statistics
from sparsekd.compression.lowrank import Projection, from_input_gram, from_output_gram
from sparsekd.errors import UsageError
from sparsekd.models import MLP, find_mlps, linear_weight


def directions_of(
    model: PreTrainedModel,
    batches: list[Tensor],
    method: str,
    *,
    seed: int = 42,
    device: torch.device | None = None,
) -> dict[str, Projection]:
    """The directions of every MLP matrix by its name, most important first, from the statistics the method needs.

    Raises `UsageError` for fewer tokens than the hidden size has dimensions.
    """
    moments: dict[MLP, statistics.Moments] = {}
    two_sided = method == "two-sided"
    if method != "svd":
        hidden = model.config.get_text_config().hidden_size
        num_tokens = sum(batch.numel() for batch in batches)
        if num_tokens < hidden:
            raise UsageError(
                f"method {method!r} takes statistics of {hidden} dimensions from tokens: expected at least "
                f"{hidden} of them, better {statistics.TOKENS_PER_DIMENSION * hidden}, found {num_tokens}"
            )
        moments = statistics.collect(model, batches, curvature=two_sided, seed=seed, device=device)
    projections = {}
    for mlp in find_mlps(model):
        seen = moments.pop(mlp, None)
        for name in mlp.matrices:
            weight = linear_weight(model.get_submodule(name)).detach()
            if seen is None:
                projections[name] = from_input_gram(weight, None)
            elif name == mlp.output:
                curvature = seen.output_curvature.mean().to(weight.device) if two_sided else None
                projections[name] = from_output_gram(seen.output.mean().to(weight.device), curvature)
            else:
                curvature = seen.input_curvature[name].mean().to(weight.device) if two_sided else None
                gram = seen.input.mean().to(weight.device)
                projections[name] = from_input_gram(weight, gram, curvature)
    return projections


def few_tokens(num_tokens: int, model: PreTrainedModel) -> str | None:
    """A warning when the statistics of `num_tokens` tokens are fitted to the sample; None when they are enough."""
    hidden = model.config.get_text_config().hidden_size
    enough = statistics.TOKENS_PER_DIMENSION * hidden
    if num_tokens >= enough:
        return None
    return f"statistics from {num_tokens} tokens: at least {enough}, ten for each of {hidden} dimensions, are advised"
