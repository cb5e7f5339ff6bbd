"""Where the time of a pass goes, dense beside compressed, and how much of what could be gained was gained."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from transformers import PreTrainedModel

from sparsekd import files
from sparsekd.bench import kinds
from sparsekd.bench.bounds import mlp_multiplications, speedup_bound
from sparsekd.bench.cells import Shape
from sparsekd.bench.intervals import Estimate, estimate
from sparsekd.bench.runtimes import with_attention
from sparsekd.errors import UsageError
from sparsekd.evaluate import Serving, prompt, timed
from sparsekd.records import Record
from sparsekd.run import versions

_TURNS = 7  # of each model, after one that is not counted
_PROFILED = 6  # more of each; six are the fewest of which an interval of 95 % can be had
PASSES = 1 + _TURNS + _PROFILED  # of each model with each attention
_STEPS = 8  # of decoding in a pass


class Subject(NamedTuple):
    """A model with a way to compute attention."""

    model: str
    attention: str


def profile(
    models: dict[str, PreTrainedModel],
    shape: Shape,
    attentions: Sequence[str],
    *,
    decode: bool = False,
    trace: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """Times passes of the models in turns, then profiles some. A pass reads prompts of `shape`, or with `decode` goes
    on after them by eight tokens. The first model is the one that the others are compared with, with the first of the
    `attentions`.

    `trace` is a folder to make, of one Chrome trace for each model and attention; raises `UsageError` if it is there.
    """
    require_new(trace)
    subjects = [Subject(name, attention) for attention in attentions for name in models]
    passes = {subject: _Pass(models[subject.model], subject.attention, shape, decode) for subject in subjects}
    seconds: dict[Subject, list[float]] = {subject: [] for subject in subjects}
    say(f"  {len(subjects)} subjects, {_TURNS} turns and {_PROFILED} profiled ones")
    for number in range(1 + _TURNS):
        for subject, one in passes.items():
            taken = one.run()
            if number:
                seconds[subject].append(taken)
    parts: dict[Subject, list[dict[str, float]]] = {subject: [] for subject in subjects}
    for _ in range(_PROFILED):
        for subject, one in passes.items():
            parts[subject].append(one.profiled(None))
    if trace is not None:
        _write_traces(passes, trace)
    rows = [_row(subject, seconds[subject], parts[subject]) for subject in subjects]
    dense, *others = models
    fast, slow, share = attentions[0], attentions[-1], rows[0]["shares"][kinds.MLP]
    gains = {name: _faster(seconds, Subject(dense, fast), Subject(name, fast)) for name in others}
    return {
        "batch": shape.batch,
        "length": shape.length,
        "phase": "decode" if decode else "prefill",
        "steps": _STEPS if decode else None,
        "device": str(models[dense].device),
        "dtype": str(models[dense].dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": rows,
        "bounds": [_bound(name, models[dense], models[name], share, gain) for name, gain in gains.items()],
        "by_kind": {name: _by_kind(parts, Subject(dense, fast), Subject(name, fast)) for name in others},
        "together": [_together(seconds, parts, dense, name, slow, fast) for name in others if slow != fast],
    }


def require_new(trace: Path | None) -> None:
    """Raises `UsageError` for a folder of traces that is there already."""
    if trace is not None and trace.exists():
        raise UsageError(f"{trace} is there already: choose another folder for --trace, or remove it")


class _Pass:
    """What is timed."""

    def __init__(self, model: PreTrainedModel, attention: str, shape: Shape, decode: bool):
        self._model, self._attention, self._tokens, self._decode = model, attention, prompt(*shape), decode

    def run(self) -> float:
        """Seconds, of a step where tokens are decoded."""
        session, token = self._ready()
        return timed(lambda: self._work(session, token))[0] / (_STEPS if self._decode else 1)

    def profiled(self, trace: Path | None) -> dict[str, float]:
        """Seconds of the operators by kind, of a step where tokens are decoded."""
        session, token = self._ready()
        on_gpu = self._model.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with kinds.marked(self._model), profiler(activities=activities) as found:
            self._work(session, token)
        if trace is not None:
            found.export_chrome_trace(str(trace))
        steps = _STEPS if self._decode else 1
        parts = kinds.seconds_by_kind(found.events() or (), on_gpu)
        return {kind: seconds / steps for kind, seconds in parts.items()}

    def _ready(self) -> tuple[Serving, torch.Tensor]:
        session = Serving(with_attention(self._model, self._attention))
        return session, session.prefill(self._tokens) if self._decode else self._tokens

    def _work(self, session: Serving, tokens: torch.Tensor) -> None:
        if not self._decode:
            session.prefill(tokens)
            return
        for _ in range(_STEPS):
            tokens = session.decode(tokens)


def _write_traces(passes: dict[Subject, _Pass], folder: Path) -> None:
    with files.atomic_path(folder) as temporary:
        temporary.mkdir()
        for number, (subject, one) in enumerate(passes.items(), 1):
            title = re.sub(r"[^\w.-]+", "-", f"{number}-{subject.model}-{subject.attention}")[-100:]
            one.profiled(temporary / f"{title.strip('-')}.json")


def _row(subject: Subject, seconds: list[float], profiled: list[dict[str, float]]) -> Record:
    """The time by kind is of profiled passes, all time that of others: the profiler's own goes to no kind."""
    whole = estimate(seconds)
    parts = {kind: statistics.median(one[kind] for one in profiled) for kind in profiled[0]}
    parts[kinds.OVERHEAD] = max(0.0, whole.median - sum(parts.values()))
    total = sum(parts.values())
    return {
        "model": subject.model,
        "attention": subject.attention,
        "seconds": whole.as_dict(),
        "seconds_by_kind": parts,
        "shares": {kind: value / total for kind, value in parts.items()},
    }


def _faster(seconds: dict[Subject, list[float]], slow: Subject, fast: Subject) -> Estimate:
    """How many times as fast, from pairs of the same turn."""
    return estimate([one / other for one, other in zip(seconds[slow], seconds[fast], strict=True)])


def _by_kind(parts: dict[Subject, list[dict[str, float]]], slow: Subject, fast: Subject) -> dict[str, Record]:
    """How many times as fast each kind is, from pairs of profiled passes of the same turn; of the kinds that both
    have."""
    pairs = list(zip(parts[slow], parts[fast], strict=True))
    measured = [kind for kind in pairs[0][0] if all(one[kind] > 0 for pair in pairs for one in pair)]
    return {kind: estimate([one[kind] / other[kind] for one, other in pairs]).as_dict() for kind in measured}


def _bound(name: str, dense: PreTrainedModel, other: PreTrainedModel, share: float, measured: Estimate) -> Record:
    before, after = mlp_multiplications(dense), mlp_multiplications(other)
    bound = speedup_bound(share, before / after)
    return {
        "model": name,
        "mlp_share": share,
        "mlp_multiplications_before": before,
        "mlp_multiplications_after": after,
        "arithmetic_reduction": before / after,
        "bound": bound,
        "times_as_fast": measured.as_dict(),
        "achieved": measured.median / bound,
    }


def _together(
    seconds: dict[Subject, list[float]],
    parts: dict[Subject, list[dict[str, float]]],
    dense: str,
    other: str,
    slow: str,
    fast: str,
) -> Record:
    """The gain of other attention, also by itself, of compression, and of both; of both over the product of the two,
    from the four times of each turn."""
    base, better = Subject(dense, slow), Subject(dense, fast)
    smaller, both = Subject(other, slow), Subject(other, fast)
    attention, compression = _faster(seconds, base, better), _faster(seconds, base, smaller)
    turns = zip(*(seconds[one] for one in (base, better, smaller, both)), strict=True)
    return {
        "model": other,
        "from": slow,
        "to": fast,
        "attention_itself": _by_kind(parts, base, better).get(kinds.ATTENTION),
        "attention_alone": attention.as_dict(),
        "compression_alone": compression.as_dict(),
        "both": _faster(seconds, base, both).as_dict(),
        "product": attention.median * compression.median,
        "both_to_product": estimate([two * three / (one * four) for one, two, three, four in turns]).as_dict(),
    }
