"""Several forms at once, such as `depth+width`: what was left by one step after the other.

Each entry of `config.sparsekd.layers` belongs to the form that knows what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from sparsekd.models.forms._description import Description, Layers


class Composed:
    """A form made of forms, in the order of the steps."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = parts

    def layers(self, model: PreTrainedModel) -> Layers:
        return {name: layer for part in self._parts for name, layer in part.layers(model).items()}

    def base_opens(self, model: PreTrainedModel) -> tuple[bool, Mapping[str, Any]]:
        opened = [part.base_opens(model) for part in self._parts]
        return all(is_base for is_base, _ in opened), {k: v for _, settings in opened for k, v in settings.items()}

    def ordinary(self, model: PreTrainedModel) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        settings: dict[str, Any] = {}
        layers: dict[str, Any] = {}
        for part in reversed(self._parts):  # an earlier form has the last word: it knows of more than the matrix
            says, makes = part.ordinary(model)
            settings |= says
            layers |= makes
        return settings, layers

    def is_described(self, layer: Mapping[str, Any]) -> bool:
        return any(part.is_described(layer) for part in self._parts)

    def check(self, model: PreTrainedModel, layers: Layers) -> None:
        for part in self._parts:
            part.check(model, _of(part, layers))

    def trained(self, model: PreTrainedModel) -> set[str]:
        return set().union(*(part.trained(model) for part in self._parts))

    def guard(self, model: PreTrainedModel) -> Any:
        return next(filter(None, (part.guard(model) for part in self._parts)), None)

    def describe(self, description: Description) -> dict[str, str]:
        found: dict[str, str] = {}
        for part in self._parts:
            found |= part.describe(replace(description, layers=_of(part, description.layers)))
        removed = f"{description.method}, {description.reduction:.0%} of the MLP parameters removed"
        return found | {"compressed": removed, "format": description.form}

    def from_earlier(self, model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
        """Earlier versions had no such form."""
        raise KeyError("form")


def _of(part: Any, layers: Layers) -> Layers:
    return {name: layer for name, layer in layers.items() if part.is_described(layer)}
