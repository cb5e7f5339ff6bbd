"""What the methods that leave zeros have in common: each row of a matrix loses its least important weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekd.compression.methods import Needs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: every row is pruned alike."""


Scores = Callable[["Tensor", str, "Calibration"], "Tensor"]


@dataclass(frozen=True)
class Mask:
    """A method that sets weights to zero: `scores` gives the importance of each weight of the matrix of that name."""

    name: str
    scores: Scores
    passes: float = 0.0  # of the statistics, in plain forward passes; 0: none are needed

    FORM = "mask"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(self.passes)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        from sparsekd.compression import zeros

        return zeros.uniform(model, reduction, self.name)

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import zeros

        if self.passes:
            calibration.require_text(self.name)
        zeros.prune(model, plan, lambda weight, name: self.scores(weight, name, calibration))
        return plan
