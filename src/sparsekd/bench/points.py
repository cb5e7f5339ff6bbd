"""What models say against what they cost: the dense model and what became of it, as they are and in fewer bits.

Each is exported, and so checked, then measured as it would be served: perplexity on a text, time, bytes of the weights.
A point is dominated when another one is as good and as cheap, and better in one of both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sparsekd import export, models
from sparsekd.bench.cells import Shape
from sparsekd.bench.latency import Plan, compare
from sparsekd.bench.runtimes import stored_bytes
from sparsekd.errors import ResourceError, SparseKDError, UsageError
from sparsekd.evaluate import Perplexity, perplexity_in, ratio
from sparsekd.export import llama_cpp
from sparsekd.records import Record

COSTS = ("per_token", "first_token", "bytes")  # each is one picture
PROMPTS, ONE = Shape(16, 128), Shape(1, 128)  # of which the time to the first token is, and per token
_AS_IT_IS = ("hf", "float32", "torch")
_IN_FEWER_BITS = {  # by format: its runtime, and the number formats that are measured
    "openvino": ("openvino", ("float32", "int8", "int4")),
    "onnx": ("onnx", ("float32", "int8", "int4")),
    "gguf": ("llama.cpp", ("f16", "q8_0")),
}


@dataclass(frozen=True)
class Candidate:
    """A model, and what it is called in tables."""

    title: str
    source: export.Source


@dataclass(frozen=True)
class _Exported:
    point: Record
    folder: Path
    quality: Perplexity


def formats() -> list[str]:
    """The formats whose runtime is there, of which the first is measured by default."""
    return [one for one in _IN_FEWER_BITS if _install_line(one) is None]


def require_format(name: str | None = None) -> str:
    """The format to measure in, by default the first that is installed; raises `UsageError` for another one,
    `ResourceError` for what is not installed."""
    chosen = name or next(iter(formats()), None)
    if chosen is None:
        raise ResourceError('fewer bits need another runtime than PyTorch: pip install "sparsekd[openvino]"')
    if chosen not in _IN_FEWER_BITS:
        raise UsageError(f"--format {chosen}: expected one of {', '.join(_IN_FEWER_BITS)}")
    export.format_named(chosen)
    line = _install_line(chosen)
    if line is not None:
        raise ResourceError(f"format {chosen} has no runtime here: {line}")
    return chosen


def _install_line(format_: str) -> str | None:
    return llama_cpp.install_line() if format_ == "gguf" else export.install_line(format_)


def frontier(
    candidates: Sequence[Candidate],
    text: str,
    folder: Path,
    *,
    format_: str | None = None,
    tokens: int = 4096,
    minutes: float = 5.0,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Record:
    """Measures the candidates, of which the first is the dense one: in PyTorch, and in the runtime of `format_` in its
    number formats. Perplexity is of about `tokens` tokens of the text; timing ends after `minutes`.

    Exports lie in `folder` while it works. What a format refuses is left out, with its reason. Raises as
    `require_format`.
    """
    chosen = require_format(format_)
    runtime, weights = _IN_FEWER_BITS[chosen]
    asked = [_AS_IT_IS, *((chosen, one, runtime) for one in weights)]
    made: list[_Exported] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for candidate in candidates:
            for how in asked:
                say(f"  {candidate.title} as {how[0]} {how[1]}")
                try:
                    made.append(_exported(candidate, how, text, tokens, Path(temporary) / str(len(made))))
                except SparseKDError as error:
                    if how == _AS_IT_IS:
                        raise
                    left_out.append(f"{candidate.title} {how[0]} {how[1]}: {error}")
        plan = Plan(["torch", runtime], ["float32"], ["sdpa"], [ONE.batch, PROMPTS.batch], [ONE.length])
        names = {str(one.folder): one for one in made}
        timed = compare(list(names), plan, minutes=minutes, say=say, warn=warn)
    points = [_timed(one, name, timed["cells"]) | _beside(one.quality, made[0].quality) for name, one in names.items()]
    for point in points:
        point["dominated"] = {cost: _is_dominated(point, points, cost) for cost in COSTS}
    return {
        "points": points,
        "left_out": left_out
        + [f"{one['runtime']} {', '.join(one['shapes'])}: {one['why']}" for one in timed["left_out"]],
        **{key: timed[key] for key in ("device", "threads", "versions")},
    }


def _exported(candidate: Candidate, how: tuple[str, str, str], text: str, tokens: int, folder: Path) -> _Exported:
    format_, weights, runtime = how
    model, tokenizer = models.load(
        candidate.source.name, revision=candidate.source.revision, dtype=torch.float32
    )  # anew: an export may change it
    vocab_size = models.real_vocab_size(model, tokenizer)
    record = export.export(model, tokenizer, format_, folder, candidate.source, weights=weights)
    quality = _quality(folder, format_, vocab_size, tokenizer, text, tokens)
    point = {"model": candidate.title, "runtime": runtime, "weights": weights, "bytes": stored_bytes(str(folder))}
    return _Exported(point | {"parameters": record["parameters"]}, folder, quality)


def _quality(
    folder: Path, format_: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int
) -> Perplexity:
    with torch.inference_mode():
        return perplexity_in(_opened(folder, format_), vocab_size, tokenizer, text, max_tokens=tokens)


def _opened(folder: Path, format_: str) -> export.Runtime:
    if format_ != "hf":
        return export.format_named(format_).open(folder)
    model, _ = models.load(str(folder), dtype=torch.float32)  # format hf opens it anew for each question
    return lambda tokens: models.logits_of(model, input_ids=tokens)


def _timed(one: _Exported, name: str, cells: Sequence[Record]) -> Record:
    """The point with its times; None where time did not suffice."""
    found: dict[str, Any] = {}
    for cost, shape in (("first_token", PROMPTS), ("per_token", ONE)):
        here = [cell["models"][name] for cell in cells if _is(cell, shape) and name in cell["models"]]
        found[cost] = here[0]["seconds"][cost]["median"] if here else None
    return one.point | found


def _beside(quality: Perplexity, dense: Perplexity) -> Record:
    value, error = ratio(quality, dense)
    return {"perplexity": quality.perplexity, "ratio": value, "ratio_standard_error": error}


def _is(cell: Record, shape: Shape) -> bool:
    return (cell["batch"], cell["length"]) == shape


def _is_dominated(point: Record, points: Sequence[Record], cost: str) -> bool:
    return any(_dominates(other, point, cost) for other in points if None not in (other[cost], point[cost]))


def _dominates(one: Record, other: Record, cost: str) -> bool:
    pairs = [(one[key], other[key]) for key in ("perplexity", cost)]
    return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)
