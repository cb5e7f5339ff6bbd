"""What the methods that leave zeros have in common: which weights compare, and how a mask is planned and cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsekd.compression.methods import Needs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the zeros may be."""

    # 2:4: two of every four neighbouring inputs of an output are zero, as sparse kernels of GPUs ask for; 4:8: likewise
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"


Scores = Callable[["Tensor", str, "Calibration"], "Tensor"]


@dataclass(frozen=True)
class Mask:
    """A method that sets weights to zero: `scores` gives the importance of each weight of the matrix of that name.
    Unstructured, a weight is compared with those of its row, or with the whole matrix."""

    name: str
    scores: Scores
    by_row: bool
    passes: float = 0.0  # of the statistics, in plain forward passes; 0: none are needed

    FORM = "mask"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(self.passes)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        from sparsekd.compression import zeros

        return zeros.plan_of(model, reduction, self.name, options.pattern, self.by_row)

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import zeros

        if self.passes:
            calibration.require_text(self.name)

        def scores(weight: Tensor, name: str) -> Tensor:
            return self.scores(weight, name, calibration)

        return zeros.prune(model, plan, scores, options.pattern, self.by_row)
