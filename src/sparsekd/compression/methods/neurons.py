"""`neurons`: whole neurons are taken out of every MLP, those whose loss changes the model's distribution least when the
others make up for it.

Optimal brain surgeon (Hassibi and Stork 1993) on columns of the output matrix, in the metric of the KL there; the
others are fitted again on the inputs that they get in the narrowed model. What is left is an ordinary, faster model.
`docs/compress.md` has the mathematics. A forward and a backward pass over the text, and five forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsekd.compression.methods import Needs, _width

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options(_width.Options):
    """Widths, and how they are found."""

    # global: a width a layer, by one budget, the best quality; uniform: one width, an ordinary checkpoint of the base
    allocation: Literal["global", "uniform"] = "global"


@dataclass(frozen=True)
class Neurons:
    """The method."""

    FORM = "width"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(passes=8.0, solver_flops=20.0, streams=2, neuron_grams=6)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        """One width."""
        from sparsekd.compression import widths

        return widths.uniform(model, reduction, options.multiple, "neurons")

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import narrowing

        calibration.require_text("neurons")
        return narrowing.narrow(model, plan, calibration, options)


METHOD = Neurons()
