"""`two-sided`: the truncation that changes the model's distribution least, in the metric of the KL at the outputs.

As `whitened`, with each output weighed by the curvature of the KL there: `min tr(G dW C dW^T)`. The energies are in
nats, so that one budget can be divided over all matrices. A forward and a backward pass over the text.
`docs/compress.md` has the mathematics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekd.compression.methods._lowrank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekd.compression.directions import Projection
    from sparsekd.compression.statistics import Moments
    from sparsekd.models import MLP


def directions(weight: Tensor, mlp: MLP, name: str, moments: Moments | None) -> Projection:
    """The principal directions of the matrix's outputs in the metric of the curvature there."""
    from sparsekd.compression.directions import from_input_gram, from_output_gram

    assert moments is not None
    if name == mlp.output:
        return from_output_gram(moments.output.mean(weight.device), moments.output_curvature.mean(weight.device))
    curvature = moments.input_curvature[name].mean(weight.device)
    return from_input_gram(weight, moments.input.mean(weight.device), curvature)


# a forward pass to record, then forward and backward
METHOD = LowRank("two-sided", directions, passes=3.5, curvature=True)
