"""What a run will do on this machine before it does it: parameters, bytes, memory, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sparsekd import compression
from sparsekd.device import measured_flops, place, trains_in_bfloat16
from sparsekd.recipe import Recipe, as_dict
from sparsekd.records import Record
from sparsekd.run.costs import CacheSize, Costs, costs_of, parts_of
from sparsekd.run.rounds import Round

# Shares of the speed of a large matrix product, from SmolLM2-135M on 2 cores; elsewhere the estimate is coarser.
_FORWARD_EFFICIENCY = 0.75
_SOLVER_EFFICIENCY = 0.06
_RUNTIME_BYTES = 0.7e9  # Python, torch and the other libraries


@dataclass(frozen=True)
class Estimate:
    """What a recipe's rounds will come to."""

    recipe: Recipe
    device: str
    dtype: str
    compression: compression.Plan  # of the largest reduction
    cache_tokens: int  # of one cache
    cache: dict[str, CacheSize]  # by codec
    model_bytes: int
    peak_memory_bytes: float
    seconds: dict[str, float]  # by stage, of all rounds together
    seconds_per_token: float  # of the dense model's forward pass

    def as_dict(self) -> Record:
        """Plain values for JSON, in the order of the fields."""
        cache = {codec: asdict(size) for codec, size in self.cache.items()}
        plain = {"recipe": as_dict(self.recipe), "compression": self.compression.as_dict(), "cache": cache}
        return vars(self) | plain


def estimate(recipe: Recipe, rounds: Sequence[Round] | None = None, num_trials: int = 0) -> Estimate:
    """Parameters of each matrix before and after the largest reduction, bytes of one cache, peak memory, and seconds a
    stage of all rounds together.

    `rounds` are by default those of the recipe's run; `num_trials` of a learning rate come on top of their training.
    """
    costs = costs_of(recipe, rounds, num_trials)
    placement = place(recipe.device, recipe.model.dtype)
    itemsize, on_gpu = placement.dtype.itemsize, placement.device.type == "cuda"
    products = 2 if trains_in_bfloat16(recipe.distill.precision, placement.device) else 4
    parts = parts_of(costs, itemsize, products, recipe.distill.micro_batch_size, on_gpu)
    flops = measured_flops(placement)
    forward = 2 * costs.sizes.multiplied / (flops * _FORWARD_EFFICIENCY)
    return Estimate(
        recipe=recipe,
        device=str(placement.device),
        dtype=str(placement.dtype).removeprefix("torch."),
        compression=costs.compression,
        cache_tokens=costs.cache_tokens,
        cache=costs.cache,
        model_bytes=costs.sizes.parameters * itemsize,
        peak_memory_bytes=_RUNTIME_BYTES + max(stage.total for stage in parts.values()),
        seconds=_seconds(costs, flops, forward),
        seconds_per_token=forward,
    )


def _seconds(costs: Costs, flops: float, forward: float) -> dict[str, float]:
    work, smaller = costs.work, forward * costs.remaining
    return {
        "cache": forward * work.cached,
        "compress": forward * work.calibrated + work.solver_flops / (flops * _SOLVER_EFFICIENCY),
        "distill": smaller * (3 * work.trained + work.validated) + forward * work.asked,
        "evaluate": forward * work.evaluated + smaller * work.evaluated_smaller,
    }
