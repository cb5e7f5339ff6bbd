"""`magnitude`: a weight counts by its size alone, `|W_ij|`, against all others of its matrix. No text is needed.

The oldest baseline (Han et al., arXiv 1506.02626), compared as the paper of Wanda compares it (Sun et al., arXiv
2306.11695, table 1): over the whole matrix, so that an output may lose more of its inputs than another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekd.compression.methods._mask import Mask

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekd.compression.calibration import Calibration


def scores(weight: Tensor, name: str, calibration: Calibration) -> Tensor:
    """`|W_ij|`."""
    return weight.float().abs()


METHOD = Mask("magnitude", scores, by_row=False)
