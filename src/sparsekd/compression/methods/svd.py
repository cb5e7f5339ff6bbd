"""`svd`: the paper's truncation of each weight by itself, which is optimal for inputs that are all alike.

Real inputs are not, so it destroys the model at cuts that the other methods hardly show; it is the control. No text is
needed. Source: the paper, section III-B.
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
    """The left singular vectors of the weight."""
    from sparsekd.compression.directions import from_input_gram

    return from_input_gram(weight, None)


METHOD = LowRank("svd", directions)
