"""One name for one model: a folder or file may be written in many ways, of which `./x` and `x` are two."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"


def model_name(name: str, known: Iterable[str] = ()) -> str:
    """What a model is called: as the first of the `known` ones that is the same folder or file, else without what
    changes nothing in a path. What is no local model keeps its name: it may be a Hub id, or a mistake, to be shown."""
    place = _place(name)
    if place is None:
        return name
    for other in (*known, os.path.normpath(name)):  # which is another place behind a link, or the embedded model
        its_place = _place(other)
        if its_place is not None and place.samefile(its_place):
            return other
    return name


def teacher_weights(models: Mapping[str, float], dense: str) -> dict[str, float]:
    """The weights of a mixture's models, each by one name; the dense one's is `dense`."""
    weights: dict[str, float] = {}
    for name, weight in models.items():
        name = model_name(name, [dense, *weights])
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def expanded(path: str) -> Path:
    """A path in which `~` is the home folder; as it is where nobody knows whose."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _place(name: str) -> Path | None:
    """The folder or file that a name is of; None for what is not local."""
    path = expanded(name)
    try:
        return path if name not in ("", EMBEDDED_MODEL) and path.exists() else None
    except OSError:  # a name that is too long; whoever opens it says so
        return None
