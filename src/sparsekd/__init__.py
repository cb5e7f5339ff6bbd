"""SparseKD: make a trained language model smaller and faster, with no other teacher than the model itself.

The public API. Everything is loaded on first use, so that `import sparsekd` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekd.compression import compress as compress
    from sparsekd.corpus import blocks_from_texts as blocks_from_texts
    from sparsekd.distillation import distill as distill
    from sparsekd.errors import SparseKDError as SparseKDError
    from sparsekd.evaluate import perplexity as perplexity
    from sparsekd.models import convert as convert
    from sparsekd.models import load as load
    from sparsekd.models import save as save
    from sparsekd.recipe import load_recipe as load_recipe
    from sparsekd.teacher import Cache as Cache
    from sparsekd.teacher import cache_teacher as cache_teacher

_PUBLIC = {
    "Cache": "teacher",
    "SparseKDError": "errors",
    "blocks_from_texts": "corpus",
    "cache_teacher": "teacher",
    "compress": "compression",
    "convert": "models",
    "distill": "distillation",
    "load": "models",
    "load_recipe": "recipe",
    "perplexity": "evaluate",
    "save": "models",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"sparsekd.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'sparsekd' has no attribute {name!r}")
