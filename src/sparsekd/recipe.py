"""What a recipe file may say: one frozen dataclass a stage, in the order of the flow, and the presets.

A recipe is YAML read with `safe_load` and coerced by the declared types, so `learning_rate: 1e-4`, which YAML reads
as a string, becomes a float. An unknown key is an error that names the nearest known one. Values are checked here,
once; code after that trusts them. No torch in this file: `sparsekd --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import reprlib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sparsekd.errors import UsageError
from sparsekd.names import EMBEDDED_MODEL, model_name, teacher_weights

# of a key that changes no result beyond rounding, or names what is known by its content: no input of any stage
PASSING = {"passing": True}
_LONGEST = 100_000  # characters of a recipe: they are read in seconds
_TOO_MANY = 2**53  # more than anything that is counted, and what a float holds exactly
LORA_FILLS_ZEROS = (
    "distill.train is lora: merged adapters would fill the zeros of a masked model; set all or compressed"
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to make smaller."""

    name: str = EMBEDDED_MODEL  # a local folder, a Hub id, a .gguf file, or smollm2-135m
    revision: str | None = None  # commit, tag or branch of a Hub id
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: of the teacher's pass and of the evaluation
    trust_remote_code: bool = False  # run Python code that comes with the model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from: exactly one of `path`, `embedded`, `hub`."""

    path: str | None = field(default=None, metadata=PASSING)  # .txt, .jsonl or .parquet, relative to corpus.root
    embedded: Literal["wikipedia", "python"] | None = None  # text that installed packages carry
    hub: str | None = None  # a Hub data set, read as a stream
    config: str | None = None  # configuration of the Hub data set
    revision: str | None = None  # commit, tag or branch of the Hub data set
    text: str = "text"  # column that holds the text, or a template such as "{question}\n{answer}"
    split: str = r"\n\s*\n"  # .txt: regular expression between two documents; hub: name of the split
    weight: float = 1.0  # share of the training blocks, relative to the other sources
    holdout: float = 0.0  # fraction of the documents, the last ones, kept for evaluation only


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to evaluate on: the held-out part of a corpus source, or a file of its own."""

    holdout_of: str | None = None  # name of a corpus source with a holdout
    path: str | None = field(default=None, metadata=PASSING)  # .txt, .jsonl or .parquet, relative to corpus.root
    text: str = "text"  # as in a source
    rows_joined_by: str | None = None  # .txt: join its lines by this, as is customary for WikiText; none: as it is


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to token blocks."""

    # folder that relative paths start from; none: the current one
    root: str | None = field(default=None, metadata=PASSING)
    sources: dict[str, Source] = field(default_factory=dict)
    seq_len: int = 256  # tokens in a block
    num_blocks: int = 100  # blocks that training sees in one epoch
    num_validation_blocks: int = 16  # blocks of other documents, to choose the best weights by
    pack: bool = True  # join documents until a block is full; false: a document a block, cut at seq_len
    document_mask: bool = False  # packed documents do not see each other; positions start again with each
    overlap: Literal["stop", "drop"] = "stop"  # evaluation text in a source: an error, or its documents are left out


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who teaches; by default the dense model, for the whole run."""

    # models of the same vocabulary, with weights, whose mixed distributions are learned; none: the dense model
    models: dict[str, float] = field(default_factory=dict)
    cascade: int = 0  # generations of the dense model distilled without pruning, each the teacher of what follows
    recache: bool = False  # each round's result teaches the next round
    anchor: float = 0.0  # weight of the first teacher beside a generation or round that teaches


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The teacher's next-token distributions."""

    codec: Literal["q16", "q8", "sampled"] = "q16"  # fp16, 8-bit gaps, or tokens drawn without bias
    top_k: int | None = None  # tokens kept (or drawn) for a position; none: 32, of codec sampled 12
    # blocks in one file; a killed run loses at most one unfinished file
    blocks_per_shard: int = field(default=64, metadata=PASSING)
    batch_size: int = field(default=4, metadata=PASSING)  # blocks in one forward pass; halved when memory runs out


@dataclass(frozen=True, kw_only=True)
class Compress:
    """The structural step."""

    reduction: float = 0.15  # fraction of the dense model's MLP parameters removed
    method: Literal["whitened", "svd", "two-sided", "wanda"] = "whitened"  # wanda: zeros instead of low rank
    # energy: the paper's threshold and tiers; global: one budget over all matrices, by curvature or by the probe
    allocation: Literal["uniform", "energy", "global"] = "uniform"
    # r(m+n) - r^2 weights a matrix; r(m+n); or all of them, some zero: of method wanda, and of no other
    format: Literal["pivot", "lowrank", "mask"] = "pivot"
    num_tokens: int = 65536  # tokens of the corpus, if it has so many, that the activation statistics are taken from
    batch_size: int = 4  # blocks in one forward pass
    # the model stays in host memory; its layers visit the device one at a time
    offload: bool = field(default=False, metadata=PASSING)
    probe_tokens: int = 0  # measure each matrix's true KL on so many tokens before ranks are chosen; 0: do not
    rank_floor: float = 0.2  # global: no matrix gets less than this share of its uniform rank
    rank_cap: float = 1.0  # no matrix keeps more than this share of its rank; 1: it may stay as it is
    rank_multiple: int = 1  # ranks are multiples of this, for GPUs 8, 16 or 64
    # take the ranks from an earlier plan (compressed/stage.json) instead
    ranks_from: str | None = field(default=None, metadata=PASSING)


@dataclass(frozen=True, kw_only=True)
class RateScale:
    """Learning rates as multiples of `distill.learning_rate`, which is that of the MLP matrices; 0 freezes."""

    attention: float = 1.0
    norms: float = 1.0
    embeddings: float = 1.0  # of the tokens, and the output projection


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The training that restores what the structural step broke."""

    teacher: Literal["cache", "online"] = "cache"  # online: the dense model answers at every step, nothing is cached
    loss: Literal["bucket", "paper", "exact_t", "sampled", "renorm_full"] = "bucket"  # docs/distill.md compares them
    # every weight, the low-rank layers or masked matrices, or adapters that are merged at the end
    train: Literal["all", "compressed", "lora"] = "all"
    lora_rank: int = 16
    epochs: int = 1  # passes over the corpus
    # epochs: train them all; converged: the paper's rule, stop at a clear minimum or saturation, or after `epochs`
    stop: Literal["epochs", "converged"] = "epochs"
    patience: int = 3  # converged: validations in a row that decide
    min_improvement: float = 0.002  # converged: relative change of the validation loss that counts
    learning_rate: float = 3e-5
    lr_scale: RateScale = field(default_factory=RateScale)
    alpha: float = 0.5  # weight of the KL term; 1 - alpha is the weight of cross-entropy
    temperature: float = 2.0  # softening of the teacher in the probability domain
    batch_size: int = 4  # blocks in one optimizer step, over all processes
    # blocks in one forward and backward pass of a process; halved when memory runs out
    micro_batch_size: int = field(default=4, metadata=PASSING)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; auto: bfloat16 on GPUs that know it
    # work activations out again in the backward pass: less memory, more work
    gradient_checkpointing: bool = field(default=False, metadata=PASSING)
    warmup_ratio: float = 0.1  # part of the steps in which the learning rate rises
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validations: int = 4  # times the validation loss is measured, evenly over the steps
    checkpoint_minutes: float = field(default=5.0, metadata=PASSING)  # time between two checkpoints
    # accelerate's, such as tensorboard; metrics.jsonl is always there
    trackers: list[str] = field(default_factory=list, metadata=PASSING)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Quality of the dense, the compressed and the distilled model."""

    texts: dict[str, Text] = field(default_factory=dict)
    context: int = 512  # tokens in a window
    stride: int = 256  # tokens between the starts of two windows
    max_tokens: int | None = None  # to score of each text, in windows spread evenly over it; none: all
    # windows, or rows of a task, in one forward pass; halved when memory runs out
    batch_size: int = field(default=2, metadata=PASSING)
    agreement: bool = True  # compare with the dense model's distributions; keeps it in memory beside one other
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness; local_...: files under corpus.root
    task_limit: int | None = None  # rows of each task; none: all
    # name a task that is not available here and go on; false: an error
    skip_missing_tasks: bool = field(default=False, metadata=PASSING)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    seed: int = 42
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    model: Model = field(default_factory=Model)
    corpus: Corpus = field(default_factory=Corpus)
    teacher: Teacher = field(default_factory=Teacher)
    cache: Cache = field(default_factory=Cache)
    # rising reductions: each round prunes the round before further and trains it; none: one round, compress.reduction
    rounds: list[float] = field(default_factory=list)
    split_corpus: bool = False  # each round learns from a part of the corpus of its own; false: each from all of it
    compress: Compress = field(default_factory=Compress)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)


# The text that comes with installed packages, a small budget: what `sparsekd run MODEL` does without a recipe.
DEMO: dict[str, Any] = {
    "corpus": {
        "sources": {
            "wikipedia": {"embedded": "wikipedia", "weight": 0.8, "holdout": 0.2},
            "python": {"embedded": "python", "weight": 0.2, "holdout": 0.05},
        },
        "num_blocks": 100,
        "num_validation_blocks": 10,
        # an article quotes what a held-out one quotes, and functions share comments with held-out ones
        "overlap": "drop",
    },
    "compress": {"method": "two-sided", "allocation": "global", "num_tokens": 8192},
    "distill": {"micro_batch_size": 2},
    "evaluate": {
        "texts": {"wikipedia": {"holdout_of": "wikipedia"}, "python": {"holdout_of": "python"}},
        "max_tokens": 4096,
    },
}

# The paper's calibration corpus (section IV-C) from the Hub: 50,000 samples of four domains.
PAPER: dict[str, Any] = {
    "corpus": {
        "sources": {
            "c4": {"hub": "allenai/c4", "config": "en", "split": "train", "weight": 0.30},
            "wikitext": {
                "hub": "Salesforce/wikitext",
                "config": "wikitext-2-raw-v1",
                "split": "train",
                "weight": 0.25,
            },
            "gsm8k": {
                "hub": "openai/gsm8k",
                "config": "main",
                "split": "train",
                "text": "{question}\n{answer}",
                "weight": 0.25,
            },
            "code": {
                "hub": "codeparrot/codeparrot-clean",
                "split": "train",
                "text": "content",
                "weight": 0.20,
            },
        },
        "seq_len": 512,
        "num_blocks": 50_000,
        "num_validation_blocks": 128,
        "pack": False,
    },
    "distill": {"epochs": 2, "batch_size": 16, "validations": 20},
}

PRESETS = {"demo": DEMO, "paper": PAPER}


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
    preset = values.pop("preset", None)
    if preset is not None:
        if preset not in tuple(PRESETS):  # a tuple: what stands there may be a list, which has no hash
            raise UsageError(f"{where}: unknown preset {_short(preset)}: known are {', '.join(PRESETS)}")
        values = merge(PRESETS[preset], values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {override}: expected name=value, for example --set distill.epochs=2")
        values = merge(values, _nested(key.strip().split("."), _parse_yaml(text, f"--set {key}")))
    recipe = typing.cast(Recipe, _build(Recipe, values, where, ""))
    check(recipe)
    model = dataclasses.replace(recipe.model, name=model_name(recipe.model.name))
    teacher = dataclasses.replace(recipe.teacher, models=teacher_weights(recipe.teacher.models, model.name))
    return dataclasses.replace(recipe, model=model, teacher=teacher)


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
        value = yaml.safe_load(text)
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
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(hints)}"
                raise UsageError(f"{where}: unknown key {_dotted(name, key)!r}: {hint}")
        values = {key: _build(hints[key], item, where, _dotted(name, key)) for key, item in value.items()}
        return typing.cast(Any, kind)(**values)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(arguments[0], value, where, name)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {name} must be a section, found {_short(value)}")
        return {
            str(key): _build(arguments[1], item, where, _dotted(name, key))
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


def _dotted(name: str, key: object) -> str:
    text = str(key) if str(key).isprintable() else ascii(key)
    return f"{name}.{text}" if name else text


def _short(value: object) -> str:
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 2, 80, 80
    return shortener.repr(value)


def _scalar(kind: type, value: Any, where: str, name: str) -> Any:
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            if abs(float(value)) >= _TOO_MANY:
                raise UsageError(f"{where}: {name} is {_short(value)}: expected less than 2^53 either way")
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{where}: {name} is {_short(value)}: expected {kind.__name__}")


def check(recipe: Recipe) -> None:
    """Raises `UsageError` for a value outside its range; names it, its value and the range."""
    corpus, evaluate = recipe.corpus, recipe.evaluate
    num_rounds = recipe.teacher.cascade + max(1, len(recipe.rounds))
    ranges = [
        ("seed", recipe.seed, "less than 2^53 either way", abs(recipe.seed) < _TOO_MANY),
        ("corpus.seq_len", corpus.seq_len, ">= 8", corpus.seq_len >= 8),
        ("corpus.num_blocks", corpus.num_blocks, ">= 1", corpus.num_blocks >= 1),
        ("corpus.num_validation_blocks", corpus.num_validation_blocks, ">= 1", corpus.num_validation_blocks >= 1),
        (
            "split_corpus",
            recipe.split_corpus,
            f"false, or corpus.num_blocks at least one for each of the {num_rounds} rounds",
            not recipe.split_corpus or corpus.num_blocks >= num_rounds,
        ),
        ("teacher.cascade", recipe.teacher.cascade, ">= 0", recipe.teacher.cascade >= 0),
        ("teacher.anchor", recipe.teacher.anchor, "[0, 1)", 0 <= recipe.teacher.anchor < 1),
        ("cache.top_k", recipe.cache.top_k, "1 to 256", 1 <= (recipe.cache.top_k or 1) <= 256),
        ("cache.blocks_per_shard", recipe.cache.blocks_per_shard, ">= 1", recipe.cache.blocks_per_shard >= 1),
        (
            "corpus.document_mask",
            corpus.document_mask,
            "false where corpus.pack is false: a block is one document",
            corpus.pack or not corpus.document_mask,
        ),
        ("evaluate.context", evaluate.context, ">= 2", evaluate.context >= 2),
        ("evaluate.stride", evaluate.stride, "1 to evaluate.context", 1 <= evaluate.stride <= evaluate.context),
        ("evaluate.max_tokens", evaluate.max_tokens, ">= 2", evaluate.max_tokens is None or evaluate.max_tokens >= 2),
        ("evaluate.task_limit", evaluate.task_limit, ">= 1", evaluate.task_limit is None or evaluate.task_limit >= 1),
    ]
    for section in ("cache", "evaluate"):
        size = getattr(recipe, section).batch_size
        ranges.append((f"{section}.batch_size", size, ">= 1", size >= 1))
    for name, weight in recipe.teacher.models.items():
        ranges.append((_dotted("teacher.models", name), weight, "> 0", 0 < weight < float("inf")))
    for lower, upper in itertools.pairwise([0.0, *recipe.rounds]):
        ranges.append(("rounds", upper, f"above {lower:g}, the round before, and at most 0.95", lower < upper <= 0.95))
    for name, source in corpus.sources.items():
        where = _dotted("corpus.sources", name)
        ranges.append((f"{where}.weight", source.weight, "> 0", 0 < source.weight < float("inf")))
        ranges.append((f"{where}.holdout", source.holdout, "[0, 1)", 0 <= source.holdout < 1))
    _check_ranges(ranges)
    check_compress(recipe.compress)
    check_distill(recipe.distill)
    if recipe.compress.format == "mask" and recipe.distill.train == "lora":
        raise UsageError(LORA_FILLS_ZEROS)
    _check_targets(recipe)
    _check_places(recipe)


def check_compress(options: Compress) -> None:
    """Raises `UsageError` for a value of this section outside its range, or for options that do not go together."""
    _check_ranges(
        [
            ("compress.reduction", options.reduction, "(0, 0.95]", 0 < options.reduction <= 0.95),
            ("compress.num_tokens", options.num_tokens, ">= 1", options.num_tokens >= 1),
            ("compress.batch_size", options.batch_size, ">= 1", options.batch_size >= 1),
            ("compress.probe_tokens", options.probe_tokens, ">= 0", options.probe_tokens >= 0),
            ("compress.rank_floor", options.rank_floor, "[0, 1]", 0 <= options.rank_floor <= 1),
            ("compress.rank_cap", options.rank_cap, "(0, 1]", 0 < options.rank_cap <= 1),
            ("compress.rank_multiple", options.rank_multiple, ">= 1", options.rank_multiple >= 1),
        ]
    )
    for name, kind in typing.get_type_hints(Compress).items():
        value, known = getattr(options, name), typing.get_args(kind)
        if typing.get_origin(kind) is Literal and value not in known:
            raise UsageError(f"compress.{name} is {value!r}: expected one of {', '.join(known)}")
    _check_mask(options)
    if options.allocation == "global" and options.method != "two-sided" and not options.probe_tokens:
        raise UsageError(
            f"compress.allocation is global, which compares matrices by curvature or by the probe: expected "
            f"compress.method two-sided or compress.probe_tokens above 0, found {options.method} and 0"
        )


# What method wanda demands of the section: format mask, and the defaults of what chooses ranks.
WANDA: dict[str, Any] = {"method": "wanda", "format": "mask"} | {
    name: Compress.__dataclass_fields__[name].default
    for name in ("allocation", "probe_tokens", "rank_floor", "rank_cap", "rank_multiple", "ranks_from")
}


def _check_mask(options: Compress) -> None:
    """Format `mask` and method `wanda` go together, and without what chooses ranks."""
    if options.method != "wanda":
        if options.format == "mask":
            raise UsageError(f"compress.format is mask, which is of method wanda only: found {options.method}")
        return
    wrong = {name: value for name, value in WANDA.items() if getattr(options, name) != value}
    if wrong:
        settings = " ".join(f"compress.{name}={'null' if value is None else value}" for name, value in wrong.items())
        raise UsageError(f"compress.method is wanda, which prunes every row alike and knows no ranks: set {settings}")


def check_distill(options: Distill) -> None:
    """Raises `UsageError` for a value of this section outside its range."""
    scales = [
        (f"lr_scale.{name}", scale, "[0, 100]", 0 <= scale <= 100) for name, scale in vars(options.lr_scale).items()
    ]
    micro, batch = options.micro_batch_size, options.batch_size
    ranges = [
        ("lora_rank", options.lora_rank, ">= 1", options.lora_rank >= 1),
        ("epochs", options.epochs, ">= 1", options.epochs >= 1),
        ("patience", options.patience, ">= 1", options.patience >= 1),
        ("min_improvement", options.min_improvement, "[0, 1)", 0 <= options.min_improvement < 1),
        ("learning_rate", options.learning_rate, "(0, 1]", 0 < options.learning_rate <= 1),
        *scales,
        ("alpha", options.alpha, "[0, 1]", 0 <= options.alpha <= 1),
        ("temperature", options.temperature, "[0.1, 100]", 0.1 <= options.temperature <= 100),
        ("batch_size", batch, ">= 1", batch >= 1),
        (
            "micro_batch_size",
            micro,
            f"a divisor of distill.batch_size ({batch})",
            micro >= 1 and batch % micro == 0,
        ),
        ("warmup_ratio", options.warmup_ratio, "[0, 1]", 0 <= options.warmup_ratio <= 1),
        ("weight_decay", options.weight_decay, "[0, 1]", 0 <= options.weight_decay <= 1),
        ("max_grad_norm", options.max_grad_norm, "> 0", options.max_grad_norm > 0),
        ("validations", options.validations, ">= 1", options.validations >= 1),
        ("checkpoint_minutes", options.checkpoint_minutes, ">= 0", options.checkpoint_minutes >= 0),
    ]
    temperature = {
        "sampled": ("1 for loss sampled", options.temperature == 1),
        "exact_t": (">= 1 for loss exact_t", options.temperature >= 1),
    }
    if options.loss in temperature:
        ranges.append(("temperature", options.temperature, *temperature[options.loss]))
    _check_ranges([(f"distill.{name}", *rest) for name, *rest in ranges])


def distill_section(values: dict[str, Any]) -> Distill:
    """The section `distill` from plain values; raises `UsageError` as for a recipe."""
    section = typing.cast(Distill, _build(Distill, values, "distill()", ""))
    check_distill(section)
    return section


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


def as_dict(value: Any) -> dict[str, Any]:
    """A recipe, or a section of one, as plain JSON-able values."""
    return dataclasses.asdict(value)


def inputs_of(section: Any) -> dict[str, Any]:
    """A section as plain values, without the keys that are passing: what may decide a result."""
    return {
        one.name: _inputs(getattr(section, one.name))
        for one in dataclasses.fields(section)
        if not one.metadata.get("passing")
    }


def _inputs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inputs(item) for key, item in value.items()}
    return inputs_of(value) if dataclasses.is_dataclass(value) else value


def as_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML file that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)
