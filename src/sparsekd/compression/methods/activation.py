"""`activation`: a neuron counts by how large its values are on the text: the mean of `|z|` over the positions of a
block, and the L2 norm of that over the blocks.

Minitron (Muralidharan et al., arXiv 2407.14679), aggregated by L2 over the batch and the mean over the sequence. Of a
gated MLP the value is that of gate and up together, which the output matrix reads, as in NVIDIA's ModelOpt. One forward
pass over the text, layer by layer.
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
    """`(sum over blocks of mean over positions of |z|, squared)^(1/2)` of each neuron, by MLP."""
    from sparsekd.compression.statistics import Gram
    from sparsekd.device import solver_device
    from sparsekd.models import find_mlps, shape

    walk, found = calibration.walk(), {}
    for layer, mlp in enumerate(find_mlps(model)):
        neurons, _ = shape(model.get_submodule(mlp.output))
        squares = Gram(neurons, cap=None, diagonal=True, device=solver_device(walk.device))
        for number, (values, _) in enumerate(walk.step(layer)):
            squares.add(values.abs().unflatten(0, walk.hidden[number].shape[:2]).mean(1))
        squares.add_processes()
        found[mlp] = squares.sum.sqrt()
    return found


METHOD = Width("activation", scores, Needs(passes=1.0, streams=1))
