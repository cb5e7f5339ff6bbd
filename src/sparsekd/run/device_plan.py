"""What a run will need and take on devices that are not here: memory of each by way to spread, what fits, time.

Memory comes from the same parts as in the estimate for this machine, time from `devices.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from sparsekd.errors import UsageError
from sparsekd.recipe import Recipe
from sparsekd.records import Record
from sparsekd.run.costs import Costs, Parts, costs_of, parts_of
from sparsekd.run.devices import COMPILED, FORWARD, NOT_COMPILED, Devices, Speed, devices_named
from sparsekd.run.dry_run import Estimate

_ITEMSIZE = 2  # of bfloat16
ONE, DDP, FSDP2 = "one device", "DDP", "FSDP2"
_SPARING = {"compress": "compress.offload=true", "distill": "distill.gradient_checkpointing=true"}
_MOST = 4096  # devices to look for


@dataclass(frozen=True)
class Fit:
    """The least that a stage fits in."""

    way: str
    devices: int
    setting: str | None  # of the recipe, which has another value there
    memory_bytes: float  # of each device


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs and takes. Time is that of `fit`; None where there is none, or where it is not known."""

    memory_bytes: dict[str, float]  # of each device, by way to spread, as the recipe is
    fit: Fit | None
    tokens_per_second: float | None  # of all devices; none for `compress`
    seconds: float | None


@dataclass(frozen=True)
class DevicePlan:
    """What a recipe's rounds will come to on some devices."""

    estimate: Estimate
    devices: Devices
    stages: dict[str, StagePlan]
    assumption: str  # that the time rests on
    note: str | None

    def as_dict(self) -> Record:
        """As of an `Estimate`, and more."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        plain = self.estimate.as_dict()
        return plain | {
            "devices": asdict(self.devices),
            "stages": stages,
            "assumption": self.assumption,
            "note": self.note,
        }


def plan_devices(recipe: Recipe, text: str) -> DevicePlan:
    """The recipe's run on the devices that `text` names, as `devices_named` reads it.

    Raises `UsageError` as that does, and for a recipe that asks for another number format than bfloat16.
    """
    devices = devices_named(text)
    for key, value in (("model.dtype", recipe.model.dtype), ("distill.precision", recipe.distill.precision)):
        if value not in ("auto", "bfloat16"):
            raise UsageError(
                f"--devices plans for bfloat16, whose speed is known, but {key} is {value}: set it to auto"
            )
    costs = costs_of(recipe)
    names = ["cache", "compress", "distill", "evaluate"][recipe.distill.teacher == "online" :]
    stages = {name: _stage(name, costs, devices) for name in names}
    blocks = recipe.distill.batch_size
    note = None
    if blocks % devices.count:
        busy = f"only {blocks} have" if blocks < devices.count else "not all have"
        note = f"distill.batch_size is {blocks}: of {devices.count} devices {busy} blocks all the time"
    whole = Estimate(
        recipe=recipe,
        device=f"{devices.count} x {devices.name or 'unnamed'}, {devices.memory_bytes / 1e9:g} GB each",
        dtype="bfloat16",
        compression=costs.compression,
        cache_tokens=costs.cache_tokens,
        cache=costs.cache,
        model_bytes=costs.sizes.parameters * _ITEMSIZE,
        peak_memory_bytes=max((stage.fit.memory_bytes for stage in stages.values() if stage.fit), default=0.0),
        seconds={name: stage.seconds for name, stage in stages.items() if stage.seconds is not None},
        seconds_per_token=Speed(costs, devices).forward(recipe.cache.batch_size * recipe.corpus.seq_len),
    )
    assumption = (
        f"{devices.source}; {COMPILED:.0%} of it in a compiled training, {NOT_COMPILED:.0%} in another, "
        f"{FORWARD:.0%} in a forward pass, as measured on an H200; no time between devices"
    )
    return DevicePlan(whole, devices, stages, assumption, note)


def _stage(name: str, costs: Costs, devices: Devices) -> StagePlan:
    memory = _memory(name, costs, devices.count)
    for fit, settled in _fits(name, costs, devices):
        if fit.memory_bytes <= devices.memory_bytes:
            speed = Speed(settled, replace(devices, count=fit.devices))
            return StagePlan(memory, fit, *speed.of_stage(name))
    return StagePlan(memory, None, None, None)


def _fits(name: str, costs: Costs, devices: Devices) -> Iterator[tuple[Fit, Costs]]:
    """What may be tried, the least effort first: the devices as they are, one setting, more devices."""
    spared = _spared(name, costs.recipe)
    tried = [(None, costs)] + ([(_SPARING[name], replace(costs, recipe=spared))] if spared else [])
    count = devices.count
    while count <= max(_MOST, devices.count):
        for setting, settled in tried:
            ways = _memory(name, settled, count)
            for way in (DDP, ONE, FSDP2):
                if way in ways and not (way == ONE and DDP in ways):  # where all can be used, all are
                    yield Fit(way, 1 if way == ONE else count, setting, ways[way]), settled
        count *= 2


def _spared(name: str, recipe: Recipe) -> Recipe | None:
    """The recipe with the setting by which a stage needs less; None where it has it already, or there is none."""
    if name == "distill" and not recipe.distill.gradient_checkpointing:
        return replace(recipe, distill=replace(recipe.distill, gradient_checkpointing=True))
    if name == "compress" and not recipe.compress.offload:
        return replace(recipe, compress=replace(recipe.compress, offload=True))
    return None


def _memory(name: str, costs: Costs, count: int) -> dict[str, float]:
    """Bytes that each of `count` devices holds, by way to spread the stage over them: one device alone, a whole copy on
    each, or everything that lasts divided by their number. Evaluation is the main process's alone unless its model is
    divided; the statistics of `compress` need a whole model."""
    distill, sizes = costs.recipe.distill, costs.sizes

    def parts(processes: int) -> Parts:
        at_once = min(distill.micro_batch_size, math.ceil(distill.batch_size / processes))
        return parts_of(costs, _ITEMSIZE, _ITEMSIZE, at_once, on_gpu=True)[name]

    found = {ONE: _held(parts(1), distill.micro_batch_size < distill.batch_size)}
    if count == 1:
        return found
    accumulates = distill.micro_batch_size * count < distill.batch_size
    if name != "evaluate":
        buckets = parts(count).gradients  # DDP adds them up in memory of its own
        found[DDP] = _held(parts(count), accumulates) + buckets
    if name != "compress":
        stored = sizes.parameters if name == "cache" else costs.compression.model_parameters_stored
        # embeddings and output stay whole during a pass, the layers are gathered one at a time
        gathered = (4 if name == "distill" else _ITEMSIZE) * (sizes.ends + sizes.layer(stored))
        found[FSDP2] = _held(parts(count), accumulates, count) + gathered
    return found


def _held(parts: Parts, accumulates: bool, divided_by: int = 1) -> float:
    """Gradients grow while the activations go; those that several micro batches add to are there before. The copies of
    the weights that autocast makes are whole wherever weights are divided: the backward pass needs them."""
    lasting = (parts.weights + parts.moments) / divided_by
    passing, gradients = parts.rounded + parts.activations + parts.head, parts.gradients / divided_by
    return lasting + (gradients + passing if accumulates else max(gradients, passing))
