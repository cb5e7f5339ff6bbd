"""A recipe as plain values: for JSON, for YAML, and for what a stage was made from."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from sparsekd.recipe.sections import Compress, Recipe


def as_dict(value: Any) -> Any:
    """A recipe, or a section of one, as plain JSON-able values."""
    if isinstance(value, dict):
        return {key: as_dict(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return list(map(as_dict, value)) if isinstance(value, list) else value
    plain = {one.name: as_dict(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Compress):
        plain |= plain.pop("of_methods")
    return plain


def inputs_of(section: Any) -> dict[str, Any]:
    """A section as plain values, without the keys that are passing: what may decide a result. The options of the
    method that is used stand among those that all methods have."""
    found = {
        one.name: _inputs(getattr(section, one.name))
        for one in dataclasses.fields(section)
        if not one.metadata.get("passing") and one.name != "of_methods"
    }
    if isinstance(section, Compress):
        if not section.first:
            del found["first"]  # a single step is what it was before there were several
        found |= inputs_of(section.options)
    return found


def _inputs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inputs(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_inputs, value))
    return inputs_of(value) if dataclasses.is_dataclass(value) else value


def as_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML file that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
