"""`config.sparsekd`: what config.json says of a compressed model, the same for every form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsekd.records import Record

Layers = Mapping[str, Mapping[str, Any]]  # by the name of the module; the form says what stands in them
VERSION = 2  # 1 had one format for all layers, and a key of its own for each form


@dataclass(frozen=True)
class Dense:
    """Parameters of the model before anything was removed."""

    mlp: int
    model: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What was left, how it was chosen, and what each layer needs to be made again before its weights are read."""

    version: int = VERSION
    form: str  # of several steps those of all, as `depth+width`
    method: str
    reduction: float  # fraction of the dense model's MLP parameters that is gone
    dense: Dense
    layers: Layers

    def as_dict(self) -> Record:
        """Plain values for JSON, in the order of the fields."""
        return asdict(self)


def description_of(model: Any) -> Description | None:
    """What a model's config says; None for a model that is as it was trained."""
    found = getattr(model.config, "sparsekd", None)
    return None if found is None else read(found)


def read(found: Any) -> Description | None:
    """The description in a config; None where it is damaged."""
    try:
        one = Description(**{**found, "dense": Dense(**found["dense"])})
    except (KeyError, TypeError):
        return None
    layers = isinstance(one.layers, dict) and one.layers and all(isinstance(i, dict) for i in one.layers.values())
    numbers = isinstance(one.reduction, int | float) and all(type(i) is int for i in vars(one.dense).values())
    words = isinstance(one.form, str) and isinstance(one.method, str)
    return one if layers and numbers and words else None
