"""What a recipe must hold: the range of each value, as its field says, and what goes together."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
import typing
from typing import Annotated, Any, Literal

from sparsekd.errors import UsageError
from sparsekd.recipe.fields import Range
from sparsekd.recipe.methods import method_named, method_names
from sparsekd.recipe.sections import Compress, Distill, Recipe

_ORDER = {"depth": 0, "width": 1, "lowrank": 2, "mask": 2}  # of the forms that can be composed
TOO_MANY = 2**53  # more than anything that is counted, and what a float holds exactly
LORA_FILLS_ZEROS = (
    "distill.train is lora: merged adapters would fill the zeros of a masked model; set all or compressed"
)


def check(recipe: Recipe) -> None:
    """Raises `UsageError` for a value outside its range; names it, its value and the range."""
    corpus, teacher, evaluate = recipe.corpus, recipe.teacher, recipe.evaluate
    check_fields(recipe, "")
    num_rounds = recipe.teacher.cascade + max(1, len(recipe.rounds))
    _check_ranges(
        [
            ("seed", recipe.seed, "less than 2^53 either way", abs(recipe.seed) < TOO_MANY),
            (
                "split_corpus",
                recipe.split_corpus,
                f"false, or corpus.num_blocks at least one for each of the {num_rounds} rounds",
                not recipe.split_corpus or corpus.num_blocks >= num_rounds,
            ),
            (
                "corpus.document_mask",
                corpus.document_mask,
                "false where corpus.pack is false: a block is one document",
                corpus.pack or not corpus.document_mask,
            ),
            (
                "distill.weighting",
                recipe.distill.weighting,
                "another than domain where corpus.sources has one source only",
                recipe.distill.weighting != "domain" or len(corpus.sources) > 1,
            ),
            (
                "teacher.mixture",
                teacher.mixture,
                "arithmetic, unless teacher.models has several or teacher.anchor is above 0",
                teacher.mixture == "arithmetic" or len(teacher.models) > 1 or teacher.anchor > 0,
            ),
            ("evaluate.stride", evaluate.stride, "1 to evaluate.context", evaluate.stride <= evaluate.context),
        ]
    )
    for number, prompt in enumerate(evaluate.prompts, 1):
        if not prompt.strip() or re.search("[\ud800-\udfff]", prompt):  # YAML can write half a character
            raise UsageError(f"evaluate.prompts: number {number} is {prompt!r}: expected a text to go on from")
    for lower, upper in itertools.pairwise([0.0, *recipe.rounds]):
        expected = f"above {lower:g}, the round before, and at most 0.95"
        _check_ranges([("rounds", upper, expected, lower < upper <= 0.95)])
    check_compress(recipe.compress)
    if recipe.rounds and recipe.compress.first:
        raise UsageError(
            "rounds prune by one method, but compress has several steps: leave rounds out, or give one step"
        )
    check_distill(recipe.distill)
    if method_named(recipe.compress.method).FORM == "mask" and recipe.distill.train == "lora":
        raise UsageError(LORA_FILLS_ZEROS)
    if method_named(recipe.compress.method).FORM == "sliced" and len(recipe.rounds) > 1:
        raise UsageError(f"rounds is {recipe.rounds}: expected one, for a sliced model is not sliced again")
    _check_targets(recipe)
    _check_places(recipe)


def check_compress(section: Compress) -> None:
    """Raises `UsageError` for a value of this section outside its range, or for options that do not go together."""
    if section.method not in method_names():
        raise UsageError(f"compress.method is {section.method!r}: expected one of {', '.join(method_names())}")
    check_fields(section, "compress")
    for name, options in section.of_methods.items():
        check_fields(options, f"compress.{name}")
    method_named(section.method).check(section.options)
    for step in section.first:
        check_compress(step)
    _check_order(section)


def _check_order(section: Compress) -> None:
    """Raises `UsageError` for steps in an order in which one would find what it cannot cut."""
    steps = section.steps
    for earlier, later in itertools.pairwise(steps):
        before, after = (method_named(step.method).FORM for step in (earlier, later))
        if earlier.first or not _ORDER.get(before, 9) < _ORDER.get(after, -1):
            raise UsageError(
                f"compress: {later.method} (form {after}) cannot come after {earlier.method} (form {before}): the "
                "order is depth, then width, then lowrank or mask, each once"
            )


def check_distill(section: Distill) -> None:
    """Raises `UsageError` for a value of this section outside its range, or for options that do not go together."""
    check_fields(section, "distill")
    batch, micro = section.batch_size, section.micro_batch_size
    trains_all = section.train == "all" and all(dataclasses.astuple(section.lr_scale))
    ranges: list[tuple[str, Any, str, bool]] = [
        ("micro_batch_size", micro, f"a divisor of distill.batch_size ({batch})", batch % micro == 0),
        (
            "start",
            section.start,
            "weights where a part does not train: fresh needs distill.train all and no distill.lr_scale of 0",
            section.start == "weights" or trains_all,
        ),
    ]
    temperature = {
        "sampled": ("1 for loss sampled", section.temperature == 1),
        "exact_t": (">= 1 for loss exact_t", section.temperature >= 1),
    }
    if section.weighting is not None:
        fits = section.loss in ("bucket", "paper") and section.alpha > 0
        ranges.append(("weighting", section.weighting, "null unless loss is bucket or paper and alpha above 0", fits))
    if section.loss in temperature:
        ranges.append(("temperature", section.temperature, *temperature[section.loss]))
    _check_ranges([(f"distill.{name}", value, expected, holds) for name, value, expected, holds in ranges])


def check_fields(section: Any, name: str) -> None:
    """Raises `UsageError` for a value of the section, or of a section in it, that its field does not allow."""
    for key, hint in typing.get_type_hints(type(section), include_extras=True).items():
        _check_value(getattr(section, key), hint, dotted(name, key))


def _check_value(value: Any, hint: Any, name: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin in (typing.Union, types.UnionType):
        _check_value(value, arguments[0], name)
    elif origin is Annotated:
        for allowed in arguments[1:]:
            if isinstance(allowed, Range) and value not in allowed:
                raise UsageError(f"{name} is {value}: expected {allowed.text}")
    elif origin is Literal and value not in arguments:
        raise UsageError(f"{name} is {value!r}: expected one of {', '.join(map(str, arguments))}")
    elif origin is dict:
        for key, item in value.items():
            _check_value(item, arguments[1], dotted(name, key))
    elif dataclasses.is_dataclass(hint) and hint not in (Compress, Distill):  # these are checked with their own rules
        check_fields(value, name)


def dotted(name: str, key: object) -> str:
    """The place of a key in a recipe, in one printable line."""
    text = str(key) if str(key).isprintable() else ascii(key)
    return f"{name}.{text}" if name else text


def _check_ranges(ranges: list[tuple[str, Any, str, bool]]) -> None:
    for name, value, expected, holds in ranges:
        if not holds:
            raise UsageError(f"{name} is {value}: expected {expected}")


def _check_targets(recipe: Recipe) -> None:
    codec = "none" if recipe.distill.teacher == "online" else recipe.cache.codec
    if (recipe.distill.loss == "sampled") != (codec == "sampled"):
        raise UsageError(
            f"distill.loss is {recipe.distill.loss} and the cache's codec {codec}: `sampled` is a loss for cache.codec "
            "sampled, and no other loss is"
        )


def _check_places(recipe: Recipe) -> None:
    if not recipe.corpus.sources:
        raise UsageError("corpus.sources is empty: name at least one, for example {wiki: {path: wiki.txt}}")
    for name, source in recipe.corpus.sources.items():
        given = [key for key in ("path", "embedded", "hub") if getattr(source, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise UsageError(f"corpus.sources.{name}: expected exactly one of path, embedded, hub; found {found}")
        if source.hub is not None and source.holdout:
            raise UsageError(f"corpus.sources.{name}: a stream has no last documents: holdout works for files only")
    for name, text in recipe.evaluate.texts.items():
        check_text_name(name)
        if (text.path is None) == (text.holdout_of is None):
            raise UsageError(f"evaluate.texts.{name}: expected exactly one of path, holdout_of")
        if text.holdout_of is None:
            continue
        source = recipe.corpus.sources.get(text.holdout_of)
        if source is None or not source.holdout:
            raise UsageError(f"evaluate.texts.{name}: corpus.sources has no {text.holdout_of!r} with a holdout above 0")


def check_text_name(name: str) -> None:
    """Raises `UsageError` for a name that is not a plain file name, which it becomes a part of."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"evaluate.texts.{name}: expected a name of letters, digits, '.', '_' and '-'")
