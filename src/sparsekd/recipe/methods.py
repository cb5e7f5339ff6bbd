"""The methods of the section `compress`, as the recipe sees them: a name, options, a form.

They are the files of `compression/methods`, which stands above the recipe; each is asked by its name when a recipe
names it, so that a method is one file.
"""

from __future__ import annotations

import importlib
from typing import Any


def method_names() -> list[str]:
    """All methods."""
    return _methods().names()


def method_named(name: str) -> Any:
    """The `compression.methods.Method` of that name, one of `method_names`."""
    return _methods().method_named(name)


def _methods() -> Any:
    return importlib.import_module("sparsekd.compression.methods")
