"""Make the MLPs of a model smaller. In: a model, blocks, a reduction; out: the smaller model and the plan of what was
done to it. Attention, norms and embeddings stay. Loaded on first use: the recipe reads the methods' options without
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekd.compression.calibration import Batch as Batch
    from sparsekd.compression.calibration import Calibration as Calibration
    from sparsekd.compression.calibration import batches_of as batches_of
    from sparsekd.compression.cut import apply as apply
    from sparsekd.compression.cut import compress as compress
    from sparsekd.compression.cut import plan_for as plan_for
    from sparsekd.compression.damage import Damage as Damage
    from sparsekd.compression.damage import damage_of as damage_of
    from sparsekd.compression.plan import Plan as Plan
    from sparsekd.compression.spectra import Spectrum as Spectrum
    from sparsekd.compression.spectra import spectra_of as spectra_of

_EXPORTED = {
    "Batch": "calibration",
    "Calibration": "calibration",
    "Damage": "damage",
    "Plan": "plan",
    "Spectrum": "spectra",
    "apply": "cut",
    "batches_of": "calibration",
    "compress": "cut",
    "damage_of": "damage",
    "plan_for": "cut",
    "spectra_of": "spectra",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTED:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTED[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
