"""What is asked of a model that somebody else made before transformers sees it.

Weights are plain safetensors in the model's own folder: an index may name any file, a config its own index, and an
adapter its own weights, and transformers would follow them, to pickles as well. A config may describe a model of any
size: what its modules and weights would take is held against what is there. `find` gives the path of a file of the
model by its name, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparsekd import files
from sparsekd.errors import DataError

_SINGLE, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_MOST_LAYERS = 1000  # whose modules are made in a second, a multiple of what any model has
_COUNTS_LAYERS = re.compile(r"n_layer|(.*_)?layers", re.ASCII)


def refuse_adapter(name: str, find: Callable[[str], Path | None]) -> None:
    """Raises `DataError` for a model with an adapter beside it, which may be a pickle and of another model."""
    if find(_ADAPTER) is not None:
        raise DataError(
            f"model {name} has an adapter beside it ({_ADAPTER}): expected whole weights; peft's merge_and_unload() "
            "and save_pretrained(NEW_FOLDER) write them"
        )


def weight_files(name: str, find: Callable[[str], Path | None]) -> list[Path]:
    """The files of a model's weights; raises `DataError` when they are anything but safetensors of plain names."""
    single = find(_SINGLE)
    if single is not None:
        return [single]
    index = find(_INDEX)
    if index is None:
        config = find("config.json")
        if config is not None:
            _refuse_pickles(name, config.parent)
        raise DataError(f"model {name}: no .safetensors file named {_SINGLE}, and no {_INDEX}")
    paths = [(file, find(file)) for file in _named_in(index)]
    missing = next((file for file, path in paths if path is None), None)
    if missing is not None:
        raise DataError(f"model {name}: {_INDEX} names {missing}, which is not there")
    return [path for _, path in paths if path is not None]


def _named_in(index: Path) -> list[str]:
    """The files that an index names, each once."""
    content = files.read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise DataError(f"{index} is damaged: expected an object `weight_map`")
    for file in names.values():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise DataError(f"{index} names {file!r}: expected files of the same folder that end in .safetensors")
    return sorted(set(names.values()))


def _refuse_pickles(name: str, folder: Path) -> None:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise DataError(
            f"model {name}: {pickled[0]} is a pickle, which can run code when read; on a machine where you trust it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors"
        )


def check_config(name: str, config: dict[str, Any]) -> None:
    """Raises `DataError` for a config that names its own weights, or more layers than can be made."""
    if config.get("transformers_weights") is not None:
        raise DataError(f"model {name}: config.json names its own weights (transformers_weights): expected {_SINGLE}")
    for key, value in [*config.items(), *_inner(config)]:
        if _COUNTS_LAYERS.fullmatch(str(key)) and isinstance(value, (int, float)) and value > _MOST_LAYERS:
            raise DataError(f"model {name}: {key} is {value} in its config: expected at most {_MOST_LAYERS}")


def _inner(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """What stands in the sections of a config, as `text_config`."""
    return [item for section in config.values() if isinstance(section, dict) for item in section.items()]


def check_size(name: str, described: int, weights: Iterable[Path]) -> None:
    """Raises `DataError` when a config describes a model of far more numbers than are stored: transformers would make
    what is missing."""
    stored = sum(_stored(path) for path in weights)
    if described > 2 * stored:  # what only a few are missing of is told by their names
        raise DataError(f"model {name}: its config describes {described} weights, its files hold {stored}")


def _stored(path: Path) -> int:
    """Numbers in a file of safetensors, by its header."""
    with safe_open(path, framework="numpy") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (no dictionary)
    return sum(map(math.prod, shapes))
