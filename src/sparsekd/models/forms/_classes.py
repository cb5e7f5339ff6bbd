"""The class of a model in which layers of ours stand in place of the base's own."""

from __future__ import annotations

import functools
from typing import Any

from sparsekd.models.forms._layers import Rebuilt

PREFIX = "sparsekd_"  # of the model_type of a class of ours, which plain transformers refuses


@functools.cache
def rebuilt_class(base: Any) -> Any:
    """The class of `base` models with the layers that `config.sparsekd` describes."""
    base_config = base.config_class
    config_class = type(
        f"SparseKD{base_config.__name__}",
        (base_config,),
        {"model_type": PREFIX + base_config.model_type, "__doc__": f"{base_config.__name__} with `sparsekd` layers."},
    )
    return type(f"SparseKD{base.__name__}", (Rebuilt, base), {"config_class": config_class})


def base_class(model_class: Any) -> Any:
    """The class that `rebuilt_class` was given; of a model of its own class, that class."""
    return model_class.__bases__[1] if issubclass(model_class, Rebuilt) else model_class
