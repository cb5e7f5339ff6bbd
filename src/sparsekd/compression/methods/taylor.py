"""`taylor`: a neuron counts by what the loss would change, to first order, without its weights: the sum of
`|w dL/dw|` over its rows of the matrices that write it and its column of the one that reads it.

LLM-Pruner (Ma et al., arXiv 2305.11627), of whose variants this is importance by element, of first order, summed over
the coupled weights; biases are left out, as in the authors' code. L is the cross-entropy of the text's own next tokens,
and `dL/dw` its gradient over all of the text. The authors leave a few of the first and last layers whole; here every
layer loses the same share, so that the result is an ordinary checkpoint. Two forward passes and a backward pass over
the text; a gradient of every MLP weight is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekd.compression.methods import Needs
from sparsekd.compression.methods._width import Width

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.models import MLP


def scores(model: PreTrainedModel, calibration: Calibration) -> dict[MLP, Tensor]:
    """The sum of `|w dL/dw|` over the weights of each neuron, by MLP."""
    from sparsekd.models import find_mlps, linear_weight

    gradients, found = calibration.weight_gradients(), {}
    for mlp in find_mlps(model):
        *writing, reading = [
            (linear_weight(model.get_submodule(name)).detach() * gradients.pop(name).to(model.device)).abs()
            for name in mlp.matrices
        ]
        found[mlp] = reading.sum(0)
        for importance in writing:  # a fused matrix has two rows for each neuron
            found[mlp] += importance.sum(1).view(-1, len(found[mlp])).sum(0)
    return found


METHOD = Width("taylor", scores, Needs(passes=4.0, weight_gradients=True))
