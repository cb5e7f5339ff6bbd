"""`leave-out`: the decoder layer without which the model's distribution changes least is taken out, then the next one.

Every layer is left out in turn, and the KL to the model as it is measured: the truth that block influence (`shortgpt`)
stands for. After each removal all that are left are measured again, for two layers that do the same are each cheap only
as long as the other one is there. With n layers left this takes about n/2 forward passes over the probe's text. Ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from sparsekd.compression.methods import Needs
from sparsekd.recipe import Range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan
    from sparsekd.compression.walk import Walk


@dataclass(frozen=True, kw_only=True)
class Options:
    """The text of the measurement."""

    probe_tokens: Annotated[int, Range(">= 1")] = 2048  # the first of compress.num_tokens, on which the KL is measured


@dataclass(frozen=True)
class LeaveOut:
    """The method."""

    FORM = "depth"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(left_out_tokens=options.probe_tokens)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        """The nearest count of layers."""
        from sparsekd.compression import depths

        return depths.nearest(model, reduction, "leave-out")

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import depths

        calibration.require_text("leave-out")
        whole = calibration.first(options.probe_tokens).walk()
        start = whole.copy()
        for layer in whole.layers:
            whole.pass_through(layer)
        gone: list[int] = []
        found: list[Mapping[int, float]] = []
        for _ in range(depths.num_removed(plan, model)):
            losses = kl_without(start, whole, [layer for layer in whole.layers if layer not in gone])
            depths.require_finite(model, losses)
            found.append(losses)
            gone.append(min(losses, key=lambda layer: losses[layer]))
        return replace(depths.remove(model, plan, gone, found[0]), measured_kl=min(found[-1].values()))


def kl_without(start: Walk, whole: Walk, layers: list[int]) -> dict[int, float]:
    """The KL to the `whole` walk, in nats a token, of one through these layers less one of them, by its number."""
    through, without = start.copy(), {}
    for layer in layers:
        left_out = through.copy()
        for walk in (through, *without.values()):
            walk.pass_through(layer)
        without[layer] = left_out
    return dict(zip(without, whole.kl_of(list(without.values())), strict=True))


METHOD = LeaveOut()
