"""From YAML, a preset or a model's name to a recipe.

A recipe is YAML of plain values, coerced by the declared types, so `learning_rate: 1e-4`, which YAML reads as a string,
becomes a float. An unknown key is an error that names the nearest known one. Values are checked once; code after that
trusts them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import yaml

from sparsekd.errors import UsageError
from sparsekd.recipe.methods import method_named, method_names
from sparsekd.recipe.names import model_name, teacher_weights
from sparsekd.recipe.presets import PRESETS
from sparsekd.recipe.rules import TOO_MANY, check, check_compress, check_distill, dotted
from sparsekd.recipe.sections import Compress, Distill, Recipe

_LONGEST = 100_000  # characters of a recipe: they are read in seconds


class _Loader(yaml.SafeLoader):
    """In which 2:4 is a word; YAML 1.1 reads it as a number of base 60, which is 124."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *others]
        for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_recipe(target: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe file (.yaml), a preset, or makes the demo recipe for a model; then applies `a.b=value` overrides.

    A recipe file may start from a preset with `preset: paper`. Raises `UsageError` naming the key and the nearest
    known one, the value and what was expected, or the file.
    """
    where = "recipe"
    if target.endswith((".yaml", ".yml")):
        where = target
        values = _read_yaml(Path(target))
    elif target in PRESETS:
        values = {"preset": target}
    else:
        values = {"preset": "demo", "model": {"name": target}}
    steps: Any = values.get("compress")
    if isinstance(steps, list):
        values = {**values, "compress": _steps(steps, where)}
    preset = values.pop("preset", None)
    if preset is not None:
        if preset not in tuple(PRESETS):  # a tuple: what stands there may be a list, which has no hash
            raise UsageError(f"{where}: unknown preset {_short(preset)}: known are {', '.join(PRESETS)}")
        values = merge(PRESETS[preset], values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {override}: expected name=value, for example --set distill.epochs=2")
        changes = _nested(key.strip().split("."), _parse_yaml(text, f"--set {key}"))
        if isinstance(changes.get("compress"), list):  # in place of what the recipe says
            values = {**values, "compress": _steps(changes["compress"], "--set compress")}
        else:
            values = merge(values, changes)
    recipe = typing.cast(Recipe, _build(Recipe, values, where, ""))
    check(recipe)
    model = dataclasses.replace(recipe.model, name=model_name(recipe.model.name))
    teacher = dataclasses.replace(recipe.teacher, models=teacher_weights(recipe.teacher.models, model.name))
    return dataclasses.replace(recipe, model=model, teacher=teacher)


def _steps(steps: list[Any], where: str) -> dict[Any, Any]:
    """A list of steps as the last one's section, with the others before it."""
    if not steps or not all(isinstance(step, dict) for step in steps):
        raise UsageError(f"{where}: compress is {_short(steps)}: expected a section, or a list of sections")
    return {**steps[-1], "first": steps[:-1]}


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path} cannot be read: not UTF-8 at byte {error.start}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected sections such as `corpus:` and `distill:`, found {type(values).__name__}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    if len(text) > _LONGEST:
        raise UsageError(f"{where}: {len(text)} characters are no recipe: expected at most {_LONGEST}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UsageError(f"{where}: aliases (*name) may stand for gigabytes: write what they stand for")
        value = _Loader(text).get_single_data()
        repr(value)  # a number of too many digits to be shown raises here, once for all messages
        return value
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # `a: 2001-99-99`
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}


def merge(base: dict[Any, Any], changes: dict[Any, Any]) -> dict[Any, Any]:
    """`base` with `changes` laid over it, section by section; neither argument is modified."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _build(kind: Any, value: Any, where: str, name: str) -> Any:
    """Coerces `value` to the declared type `kind`; `name` is the dotted place for the message."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {name or 'top level'} must be a section, found {_short(value)}")
        if kind is Compress:
            return _compress(value, where, name)
        return typing.cast(Any, kind)(**_fields(typing.get_type_hints(kind), value, where, name))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(arguments[0], value, where, name)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {name} must be a section, found {_short(value)}")
        return {
            str(key): _build(arguments[1], item, where, dotted(name, key))
            for key, item in value.items()
            if item is not None  # `--set corpus.sources.python=null` takes a source out
        }
    if origin is list:
        if not isinstance(value, list):
            raise UsageError(f"{where}: {name} is {_short(value)}: expected a list such as [a, b]")
        return [_build(arguments[0], item, where, name) for item in value]
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where}: {name} is {_short(value)}: expected one of {', '.join(map(str, arguments))}")
        return value
    return _scalar(kind, value, where, name)


def _fields(
    hints: Mapping[str, Any],
    value: Mapping[Any, Any],
    where: str,
    name: str,
    inside: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values of a section's keys, coerced to the types that `hints` have for them; `inside` are keys of a section
    in it that an unknown key may be meant for, with their places."""
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), [*hints, *inside], n=1, cutoff=0.5)
            close = [inside.get(found, found) for found in close]
            hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(hints)}"
            raise UsageError(f"{where}: unknown key {dotted(name, key)!r}: {hint}")
    return {key: _build(hints[key], item, where, dotted(name, key)) for key, item in value.items()}


def _compress(value: Mapping[Any, Any], where: str, name: str) -> Compress:
    """The section `compress`, which has a section for the options of each method."""
    kinds: dict[str, Any] = {method: method_named(method).Options for method in method_names()}
    hints = typing.get_type_hints(Compress)
    del hints["of_methods"]
    method = value.get("method", Compress.method)
    own = _defaults(kinds[method]) if method in tuple(kinds) else {}
    inside = {key: f"{method}.{key}" for key in own}
    built = _fields(hints | kinds, _with_own_section(value, hints, kinds), where, name, inside)
    sections = {key: built.pop(key) for key in kinds if key in built}
    return Compress(**built, of_methods=sections)


def _with_own_section(value: Mapping[Any, Any], hints: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[Any, Any]:
    """The section with what is not common to all methods in that of its method: recipes of version 0.1, and the
    library's `compress()`, have all options side by side. Of other methods' they may name the defaults."""
    method = value.get("method", Compress.method)
    if not (isinstance(method, str) and method in kinds):
        return dict(value)
    kept, own = {}, {}
    for key, item in value.items():
        defaults = {name: _defaults(kind)[key] for name, kind in kinds.items() if key in _defaults(kind)}
        if key in hints or key in kinds or not defaults:
            kept[key] = item
        elif method in defaults:
            own[key] = item
        elif item not in (*defaults.values(), "mask"):  # the format that wanda had to be given
            raise UsageError(
                f"compress.{key} is {_short(item)}, which is an option of {', '.join(defaults)}, not of {method}: "
                "leave it out"
            )
    section = value.get(method) or {}
    return kept | ({method: section | own} if own and isinstance(section, dict) else {})


def _defaults(kind: Any) -> dict[str, Any]:
    return {one.name: one.default for one in dataclasses.fields(kind)}


def _short(value: object) -> str:
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 2, 80, 80
    return shortener.repr(value)


def _scalar(kind: type, value: Any, where: str, name: str) -> Any:
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            if abs(float(value)) >= TOO_MANY:
                raise UsageError(f"{where}: {name} is {_short(value)}: expected less than 2^53 either way")
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{where}: {name} is {_short(value)}: expected {kind.__name__}")


def compress_section(values: dict[str, Any]) -> Compress:
    """The section `compress` from plain values, those of the method's own section among them or apart; raises
    `UsageError` as for a recipe."""
    section = _compress(values, "compress()", "")
    check_compress(section)
    return section


def distill_section(values: dict[str, Any]) -> Distill:
    """The section `distill` from plain values; raises `UsageError` as for a recipe."""
    section = typing.cast(Distill, _build(Distill, values, "distill()", ""))
    check_distill(section)
    return section
