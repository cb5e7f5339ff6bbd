"""`sparsegpt`: weights go by what their loss does to the outputs of their matrix on the text when the other weights of
the output make up for it, and these are updated.

SparseGPT (Frantar and Alistarh, arXiv 2301.00774): `W_ij^2 / [H^-1]_jj^2` over blocks of 128 inputs, from the first
decoder layer to the last. A forward pass over the text, and another of the layers that are pruned by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekd.compression.methods import Needs
from sparsekd.compression.methods._mask import Options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True)
class SparseGPT:
    """The method."""

    FORM = "mask"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(passes=2.0, solver_flops=20.0, streams=1, neuron_grams=4)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        from sparsekd.compression import zeros

        return zeros.plan_of(model, reduction, "sparsegpt", options.pattern, by_row=False)

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import reconstruction

        calibration.require_text("sparsegpt")
        return reconstruction.prune(model, plan, calibration.walk(), options.pattern)


METHOD = SparseGPT()
