"""`magnitude`: a weight counts by its size alone, `|W_ij|`, against its own output row. No text is needed.

The oldest baseline (Han et al., arXiv 1506.02626); the comparison within a row is that of Wanda (Sun et al., arXiv
2306.11695), so that the two differ in the score only.
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


METHOD = Mask("magnitude", scores)
