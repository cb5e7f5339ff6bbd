"""What a compressed model consists of: one file for each form, found by its name.

A form says what config.json holds of each layer, makes the layers again before weights are read, checks what is
promised, and keeps it through training. Whoever loads, saves, trains, inspects, exports or reports a compressed model
asks the form; nobody asks the method.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.errors import DataError
from sparsekd.models.anatomy import mlp_parameters, num_parameters, replace_module
from sparsekd.models.copying import twin
from sparsekd.models.forms._classes import PREFIX as PREFIX
from sparsekd.models.forms._classes import base_class as base_class
from sparsekd.models.forms._classes import rebuilt_class
from sparsekd.models.forms._composed import Composed
from sparsekd.models.forms._description import VERSION, Dense, Description, Layers, description_of, read

Linear = tuple[Float[Tensor, "O I"], Float[Tensor, " O"] | None]  # matrix and bias of an ordinary layer


@runtime_checkable
class Guard(Protocol):
    """What training must not change."""

    def drop_gradients(self) -> None:
        """Before clipping."""

    def restore(self) -> None:
        """After the optimizer's step."""


@runtime_checkable
class Form(Protocol):
    """A file of this folder."""

    def layers(self, model: PreTrainedModel) -> Layers:
        """What config.json says of each layer, read off the model."""
        ...

    def base_opens(self, model: PreTrainedModel) -> tuple[bool, Mapping[str, Any]]:
        """Whether the class of the base model makes the form's layers by itself, and what its config has to say beside
        `sparsekd`. A class of ours makes them where it does not."""
        ...

    def ordinary(self, model: PreTrainedModel) -> tuple[Mapping[str, Any], Mapping[str, Linear]]:
        """What the base's config has to say, and the layers by name, for the base's class to compute the same. Raises
        `UsageError` where it cannot."""
        ...

    def is_described(self, layer: Mapping[str, Any]) -> bool:
        """Whether config.json says of a layer what it has to."""
        ...

    def check(self, model: PreTrainedModel, layers: Layers) -> None:
        """Raises `DataError` for what the model does not keep of what config.json says."""

    def trained(self, model: PreTrainedModel) -> set[str]:
        """The modules that `distill.train: compressed` means."""
        ...

    def guard(self, model: PreTrainedModel) -> Guard | None:
        """What keeps the form during training; None where nothing has to."""

    def describe(self, description: Description) -> dict[str, str]:
        """Facts for `inspect`; `compressed` is the first."""
        ...

    def from_earlier(self, model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
        """The layers of a description that an earlier version wrote; `model` is the dense one."""
        ...


def names() -> list[str]:
    """All forms."""
    return sorted(file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_"))


def form_named(name: str) -> Form:
    """The form of that name, one of `names`, or several with a plus between them."""
    if "+" in name:
        return _composed(name)
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module


@functools.cache
def _composed(name: str) -> Form:
    return Composed([form_named(part) for part in name.split("+")])


def _is_known(name: str) -> bool:
    return all(part in names() for part in name.split("+"))


def form_of(model: PreTrainedModel) -> Form | None:
    """The form that a model has; None for a dense one."""
    description = description_of(model)
    return None if description is None else form_named(description.form)


def check(model: PreTrainedModel) -> None:
    """Raises `DataError` for what a compressed model does not keep of what its config says; all is well with a dense
    one."""
    description = description_of(model)
    if description is not None:
        form_named(description.form).check(model, description.layers)


def trained(model: PreTrainedModel) -> set[str]:
    """The modules that `distill.train: compressed` means; of a dense model none."""
    form = form_of(model)
    return set() if form is None else form.trained(model)


def guard(model: PreTrainedModel) -> Guard | None:
    """What keeps the model's form during training; None where nothing has to."""
    form = form_of(model)
    return None if form is None else form.guard(model)


def describe(model: PreTrainedModel) -> dict[str, str]:
    """Facts for `inspect`; of a dense model none."""
    description = description_of(model)
    if description is None:
        return {}
    return form_named(description.form).describe(description)


def dense_sizes(model: PreTrainedModel) -> Dense:
    """Parameters of the model, and of its MLPs, before anything was removed from it."""
    description = description_of(model)
    if description is not None:
        return description.dense
    return Dense(mlp_parameters(model), num_parameters(model))


def mark(model: PreTrainedModel, form_name: str, method: str, reduction: float, dense: Dense) -> None:
    """Writes in the config of `model`, which has the form's layers already, what it is, and makes it of the class that
    opens such a model, in place."""
    form, config = form_named(form_name), model.config
    described = Description(form=form_name, method=method, reduction=reduction, dense=dense, layers=form.layers(model))
    is_base, settings = form.base_opens(model)
    base = base_class(type(model))
    _make_fitting(model, base if is_base else rebuilt_class(base), settings)
    marked: Any = config
    marked.sparsekd = described.as_dict()


def _make_fitting(model: PreTrainedModel, fitting: Any, settings: Mapping[str, Any]) -> None:
    """Makes a model and its config of the class that opens them, and the config say what that needs."""
    config = model.config
    if type(model) is not fitting:
        model.__class__, config.__class__ = fitting, fitting.config_class
        vars(config).pop("model_type", None)  # of a config that was read, whose class says it too
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)


def require_mergeable(model: PreTrainedModel) -> None:
    """Raises `UsageError` for a form of which no model of the base's class computes the same."""
    form = form_of(model)
    if form is not None and form is form_named("sliced"):
        form.ordinary(model)  # raises at once, and says why; the others multiply matrices there


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the base's own class that computes the same with ordinary matrices; low rank is multiplied out, MLPs
    of several widths are filled up with zeros to the widest. It shares with `model` what is not made new, and does not
    say any more that anything was removed."""
    form, copied = form_of(model), twin(model)
    if form is None:
        return copied
    base, (settings, layers) = base_class(type(model)), form.ordinary(model)
    _make_fitting(copied, base, settings)
    config: Any = copied.config
    del config.sparsekd
    with torch.device("meta"):
        modules = base(config)
    for name, (weight, bias) in layers.items():
        matrix = weight.T if isinstance(modules.get_submodule(name), Conv1D) else weight
        layer: Any = modules.get_submodule(name)
        layer.weight = nn.Parameter(matrix.contiguous())
        layer.bias = None if bias is None else nn.Parameter(bias)
        replace_module(copied, name, layer)
    return copied.eval()


def require_described(found: Any, source: str) -> None:
    """Raises `DataError` when a config does not say of what form a model is, and what each layer is."""
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise DataError(
            f"model {source}: `sparsekd` in config.json has version {version}, this sparsekd knows {VERSION}: "
            "install a newer one"
        )
    description = read(found)
    form = form_named(description.form) if description is not None and _is_known(description.form) else None
    if description is None or form is None or not all(map(form.is_described, description.layers.values())):
        raise DataError(
            f"model {source}: `sparsekd` in config.json is damaged: expected version, form ({' or '.join(names())}), "
            "method, reduction, dense and layers"
        )


def from_earlier(found: Any, dense: PreTrainedModel) -> Any:
    """A description that version 1 wrote, as one of now; `dense` is the model that was compressed, without weights.
    What it lacks is left for `require_described` to name."""
    name = "mask" if found.get("format") == "mask" else "lowrank"
    try:
        described = Description(
            form=name,
            method=found["method"],
            reduction=found["reduction"],
            dense=dense_sizes(dense),
            layers=form_named(name).from_earlier(dense, found),
        )
        return described.as_dict()
    except (KeyError, TypeError, AttributeError):
        return found
