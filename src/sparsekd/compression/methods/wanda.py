"""`wanda`: a weight counts by what it does on the calibration text, `|W_ij| ||x_j||_2`, against its own output row.

Wanda (Sun et al., arXiv 2306.11695); the control that the paper calls WANDA. One forward pass over the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekd.compression.methods._mask import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekd.compression.calibration import Calibration


def scores(weight: Tensor, name: str, calibration: Calibration) -> Tensor:
    """`|W_ij| ||x_j||_2`."""
    return weight.float().abs() * calibration.input_norms[name].float().to(weight.device)


METHOD = Mask("wanda", scores, by_row=True, passes=1.0)
