"""Form `depth`: fewer decoder layers, each of them as it was.

The base's own class opens the model: its config has the number of layers, and what it lists for each of them (the kinds
of attention, say) follows those that are kept. That the config, once written and read again, makes the same modules is
tried without weights before anything changes, for in some architectures a layer is another one at another place.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekd.errors import DataError, UsageError
from sparsekd.models.anatomy import find_mlps, list_of_layers
from sparsekd.models.forms._classes import base_class
from sparsekd.models.forms._description import Description, Layers, description_of

_NUMBERS_KEY = re.compile(r"layer|idx|indices")  # what configs call a list of some layers' numbers
_Fact = tuple[str, str, Any]  # module, attribute, value


# ---- the form


def layers(model: PreTrainedModel) -> Layers:
    """What config.json says of the list of layers: which ones of the dense model's are left, and how many it had."""
    kept, dense = left(model)
    return {list_of_layers(model): {"kept": kept, "dense": dense}}


def left(model: PreTrainedModel) -> tuple[list[int], int]:
    """The numbers that the model's layers have in the dense model, ascending, and how many there are in that."""
    name, described = list_of_layers(model), description_of(model)
    modules: Any = model.get_submodule(name)
    known = {} if described is None else described.layers.get(name, {})
    dense = getattr(modules, "dense", known.get("dense", len(modules)))
    return list(getattr(modules, "kept", known.get("kept", range(dense)))), dense


def base_opens(model: PreTrainedModel) -> tuple[bool, dict[str, Any]]:
    """The base's class opens every such model; `keep` has written in its config what that needs."""
    return True, {}


def ordinary(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """All is ordinary."""
    return {}, {}


def is_described(layer: Mapping[str, Any]) -> bool:
    """Whether config.json says of the list of layers what it has to."""
    kept, dense = layer.get("kept"), layer.get("dense")
    if not isinstance(kept, list) or not kept or not all(type(number) is int for number in kept):
        return False
    return type(dense) is int and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < dense


def check(model: PreTrainedModel, layers: Layers) -> None:
    """Raises `DataError` where the model's layers are not as many as config.json describes."""
    name = list_of_layers(model)
    if list(layers) != [name]:
        raise DataError(f"config.json says which layers of {', '.join(layers)} are left: expected {name}")
    modules: Any = model.get_submodule(name)
    if len(modules) != len(layers[name]["kept"]):
        raise DataError(f"{name} has {len(modules)} layers, config.json says {len(layers[name]['kept'])} are left")


def trained(model: PreTrainedModel) -> set[str]:
    """The matrices that `distill.train: compressed` means: as in form `width`, those of all MLPs that are left."""
    return {name for mlp in find_mlps(model) for name in mlp.matrices}


def guard(model: PreTrainedModel) -> None:
    """Training keeps the form by itself."""


def describe(description: Description) -> dict[str, str]:
    """Facts for `inspect`."""
    found = next(iter(description.layers.values()))
    gone = sorted(set(range(found["dense"])) - set(found["kept"]))
    return {
        "compressed": f"{description.method}, {len(gone)} of {found['dense']} layers removed",
        "format": "depth",
        "removed layers": ", ".join(map(str, gone)),
    }


def from_earlier(model: PreTrainedModel, description: Mapping[str, Any]) -> Layers:
    """Version 1 had no such form."""
    raise KeyError("kept")


# ---- removing layers


def keep(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Leaves the model its layers of these numbers, ascending, in place; after an error all of them.

    Raises `UsageError` where the base makes other layers than these from a config that has no more than them.
    """
    modules: Any = model.get_submodule(list_of_layers(model))
    settings, changes = tried(model, numbers)
    kept, count = left(model)
    for number in reversed(range(len(modules))):
        if number not in numbers:
            del modules[number]
    modules.kept, modules.dense = [kept[number] for number in numbers], count
    for key, value in settings.items():
        setattr(model.config.get_text_config(), key, value)
    for path, key, value in changes:
        setattr(model.get_submodule(path), key, value)


def tried(model: PreTrainedModel, numbers: Sequence[int]) -> tuple[dict[str, Any], list[_Fact]]:
    """What `keep` writes in the config and in the modules; the model may be without weights. Raises as `keep`."""
    settings = _settings(model, numbers)
    try:
        short = _made(model, settings)
    except Exception as error:  # what checks a config raises almost any class
        raise _refused(model, " ".join(str(error).split()).rstrip(".")) from error
    return settings, list(_changes(_made(model, {}), short, list_of_layers(model), numbers))


def take_shape(model: PreTrainedModel, planned: Any) -> None:
    """Leaves a model without weights as many layers as a `Plan`, the first ones."""
    left = {line.name for line in planned.matrices if line.parameters_after}
    keep(model, range(sum(mlp.output in left for mlp in find_mlps(model))))


def _settings(model: PreTrainedModel, numbers: Sequence[int]) -> dict[str, Any]:
    """What the config has to say of these layers alone: how many, and in its lists what belongs to them."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    settings: dict[str, Any] = {"num_hidden_layers": len(numbers)}
    for key, value in vars(config).items():
        if not isinstance(value, (list, tuple)) or key.endswith("_token_id"):
            continue
        if len(value) == count:
            settings[key] = [value[number] for number in numbers]
        elif _NUMBERS_KEY.search(key) and all(type(one) is int for one in value):
            settings[key] = [new for new, old in enumerate(numbers) if old in value]
    return settings


def _made(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """The modules that the base makes from the model's config with these settings, written and read again."""
    config = copy.deepcopy(model.config)
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    with torch.device("meta"):
        return base_class(type(model))(type(config).from_dict(config.to_diff_dict()))


def _changes(dense: PreTrainedModel, short: PreTrainedModel, name: str, numbers: Sequence[int]) -> Iterator[_Fact]:
    """The attributes by which the modules of `short`, whose layers are those of the `numbers` in `dense`, differ from
    these: a layer's own number, and outside of the layers whatever tells how many they are. Raises as `keep`."""
    now, before = _by_place(short, name, range(len(numbers))), _by_place(dense, name, numbers)
    if now.keys() != before.keys():
        raise _refused(short, f"{min(now.keys() ^ before.keys())} depends on them")
    for path, (module, number) in now.items():
        other, old = before[path]
        if type(module) is not type(other) or _shapes(module) != _shapes(other):
            raise _refused(short, f"{path} depends on them")
        facts = _facts(other)
        for key, value in _facts(module).items():
            if value == facts.get(key, value):
                continue
            if number is not None and (value, facts[key]) != (number, old):
                raise _refused(short, f"{path} depends on them")
            yield path, key, value


def _by_place(model: PreTrainedModel, name: str, numbers: Sequence[int]) -> dict[str, tuple[nn.Module, int | None]]:
    """All modules but the layers that have none of the numbers, each with the number of the layer that it is in, by
    their names with the layers counted anew."""
    found: dict[str, tuple[nn.Module, int | None]] = {}
    for path, module in model.named_modules():
        if not path.startswith(f"{name}."):
            found[path] = (module, None)
    for new, old in enumerate(numbers):
        for path, module in model.get_submodule(f"{name}.{old}").named_modules(prefix=f"{name}.{new}"):
            found[path] = (module, old)
    return found


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.named_parameters(recurse=False)}


def _facts(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in (bool, int, float, str, type(None))}


def _refused(model: PreTrainedModel, reason: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} cannot be opened with these layers alone: {reason}; expected layers that are the same "
        "wherever they stand, so choose a method of another form"
    )
