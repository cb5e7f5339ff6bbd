"""What the methods that take neurons out have in common: widths, and for those that give each neuron a score, the cut:
the neurons of the highest scores stay as they are, and nothing makes up for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sparsekd.compression.methods import Needs
from sparsekd.recipe import Range

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan
    from sparsekd.models import MLP


@dataclass(frozen=True, kw_only=True)
class Options:
    """Widths."""

    multiple: Annotated[int, Range(">= 1")] = 32  # widths are multiples of it: int8, GGUF and GPU kernels need 32


Scores = Callable[["PreTrainedModel", "Calibration"], Mapping["MLP", "Tensor"]]


@dataclass(frozen=True)
class Width:
    """A method that leaves all MLPs one width: `scores` gives the importance of each neuron, one vector for each MLP,
    whose neurons are compared with each other only."""

    name: str
    scores: Scores
    asks: Needs

    FORM = "width"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return self.asks

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        from sparsekd.compression import widths

        return widths.uniform(model, reduction, options.multiple, self.name)

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import narrowing

        calibration.require_text(self.name)
        narrowing.keep_highest(model, plan, self.scores(model, calibration))
        return plan
