"""`whitened`: the truncation that changes a matrix's outputs on the calibration text least, `min E|Wx - W'x|^2`.

The optimum of SVD-LLM (Wang et al., arXiv 2403.07378), in an inverse-free form. One forward pass over the text.
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
    """The principal directions of the matrix's outputs."""
    from sparsekd.compression.directions import from_input_gram, from_output_gram

    assert moments is not None
    if name == mlp.output:
        return from_output_gram(moments.output.mean(weight.device))
    return from_input_gram(weight, moments.input.mean(weight.device))


METHOD = LowRank("whitened", directions, passes=1.0)
