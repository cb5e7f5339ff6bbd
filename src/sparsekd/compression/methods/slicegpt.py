"""`slicegpt`: the residual stream is rotated to its principal components, and the least of them are cut off.

SliceGPT (Ashkboos et al., arXiv 2401.15024). Norms become RMSNorms without weights, which a rotation passes through;
before each norm the stream is in the basis of its principal components there, in the model that is sliced up to there,
and two shortcuts a layer carry it from basis to basis. The paper takes the components of what a norm gives, its
authors' code (microsoft/TransformerCompression) those of what it reads, as here. All matrices get narrower, those of
attention and the embeddings too: the reduction is of the MLPs as everywhere, and one width serves all layers. Two
forward passes over the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from sparsekd.compression.methods import Needs
from sparsekd.recipe import Range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options:
    """The width of the residual stream."""

    multiple: Annotated[int, Range(">= 1")] = 8  # the width is a multiple of it, as in the published code


@dataclass(frozen=True)
class SliceGPT:
    """The method."""

    FORM = "sliced"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(passes=2.5, solver_flops=5.0, streams=1)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        """The largest width that removes enough."""
        from sparsekd.compression import slicing

        return slicing.plan_of(model, reduction, options.multiple, "slicegpt")

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import slicing

        calibration.require_text("slicegpt")
        slicing.slice_stream(model, plan.reduction, options.multiple, calibration)
        return plan


METHOD = SliceGPT()
