"""How fast models serve, side by side: time to the first token of prompts and time per token after it, memory, bytes.

In every cell the models take turns, each in a process of its own, and change places from turn to turn; a ratio is the
median over turns of what the first model takes to what another takes, so that what else the machine does cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from sparsekd.bench.cells import STEPS, Shape, Variant, in_order
from sparsekd.bench.intervals import Estimate, estimate
from sparsekd.bench.runtimes import RUNTIMES, stored_bytes
from sparsekd.bench.subject import OutOfTime, Remote
from sparsekd.device import out_of_memory, place
from sparsekd.errors import ResourceError, SparseKDError, UsageError
from sparsekd.records import Record
from sparsekd.run import versions

_TIMES = ("first_token", "per_token")
_FEWEST, _USUAL, _MOST = 3, 6, 25  # turns; six are the fewest of which an interval of 95 % can be had
_SHARE = 0.5  # of the time that is left, after which a cell ends that has the fewest turns

Turns = dict[str, list[Record]]  # by the model's name


class Plan(NamedTuple):
    """What is asked for; of each option the first is what matters most."""

    runtimes: Sequence[str]
    dtypes: Sequence[str]
    attentions: Sequence[str]
    batches: Sequence[int]
    lengths: Sequence[int]

    def variants(self) -> list[Variant]:
        """How models are run; raises `UsageError` where no runtime has any of the number formats and attentions."""
        found = [
            Variant(name, *how)
            for name in self.runtimes
            for how in RUNTIMES[name].variants(self.dtypes, self.attentions)
        ]
        if not found:
            asked = f"--dtype {','.join(self.dtypes)} --attention {','.join(self.attentions)}"
            has = "; ".join(f"{one} has {', '.join(RUNTIMES[one].dtypes)}" for one in self.runtimes)
            raise UsageError(f"{asked}: {has}")
        return found


def compare(
    names: Sequence[str],
    plan: Plan,
    *,
    minutes: float = 5.0,
    precision: float = 0.02,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Record:
    """Measures the models, the first of which is the reference, until all is measured or the `minutes` are over.

    Turns of a cell go on until each ratio is known to `precision`, half of its interval as a share of it. Raises
    `UsageError` for a model that is not there; where nothing could be measured, what came in the way, or
    `ResourceError` for time that did not suffice.
    """
    disk = {name: stored_bytes(name) for name in names}
    bench = _Bench(names, str(place(device).device), torch.get_num_threads(), precision, minutes, say, warn)
    for variant, shapes in in_order(plan.variants(), plan.batches, plan.lengths):
        bench.measure(variant, shapes)
    if not bench.cells:
        raise bench.first_problem or ResourceError(f"nothing was measured within --minutes {minutes:g}: give more")
    return {
        "models": {name: {"disk_bytes": disk[name]} for name in names},
        "reference": names[0],
        "device": bench.device,
        "threads": bench.threads,
        "minutes": minutes,
        "precision": precision,
        "steps": STEPS,
        "versions": versions(),
        "cells": bench.cells,
        "left_out": bench.left_out,
    }


class _Bench:
    """What has been measured so far, and the time that is left."""

    def __init__(
        self,
        names: Sequence[str],
        device: str,
        threads: int,
        precision: float,
        minutes: float,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self._names, self.device, self.threads, self._precision = names, device, threads, precision
        self._say, self.warn = say, warn
        self._until, self._no_time = time.monotonic() + 60 * minutes, f"--minutes {minutes:g}"
        self.cells: list[Record] = []
        self.left_out: list[Record] = []
        self.first_problem: SparseKDError | None = None

    def measure(self, variant: Variant, shapes: Sequence[Shape]) -> None:
        """Adds a cell for each shape, or why it is left out."""
        if time.monotonic() >= self._until:
            return self._leave_out(variant, shapes, self._no_time)
        waiting, done = list(shapes), []
        try:
            with self._opened(variant) as subjects:
                pace = _Pace()
                while waiting:
                    shape = waiting[0]
                    if time.monotonic() + pace.seconds(shape) * _FEWEST >= self._until:
                        raise OutOfTime
                    fitting = self._cell(subjects, variant, shape, pace)
                    waiting.pop(0)
                    if fitting not in (None, shape, *done, *waiting):  # smaller, and nobody has asked for it
                        waiting.insert(0, fitting)
                    done.append(shape)
        except OutOfTime:
            self._leave_out(variant, waiting, self._no_time)
        except SparseKDError as error:
            self.first_problem = self.first_problem or error
            self._leave_out(variant, waiting, str(error))

    @contextmanager
    def _opened(self, variant: Variant) -> Iterator[dict[str, Remote]]:
        runtime = RUNTIMES[variant.runtime]
        names = [name for name in self._names if runtime.takes(name)]
        if not names:
            raise UsageError(f"none of the models is for runtime {variant.runtime}: {runtime.way_in}")
        with ExitStack() as stack:
            subjects = {name: Remote(name, variant, self.device, self.threads) for name in names}
            for subject in subjects.values():
                stack.callback(subject.close)
            self._say(f"  {variant}: opening {len(subjects)} models")
            for subject in subjects.values():
                subject.opened(self._until)
            yield subjects

    def _cell(self, subjects: dict[str, Any], variant: Variant, shape: Shape, pace: _Pace) -> Shape | None:
        """Measures a cell and returns its shape; or a smaller one that may fit, None where no prompt fits."""
        try:
            turns = take_turns(subjects, shape, self._until, self._precision, pace)
            memory = {name: subject.memory(self._until) for name, subject in subjects.items()}
        except Exception as error:
            if not out_of_memory(error):
                raise
            return self._halved(subjects, variant, shape)
        device = self.device if RUNTIMES[variant.runtime].format is None else "cpu"
        cell = {**variant._asdict(), **shape._asdict(), "device": device, **summarize(turns, memory, shape)}
        self.cells.append(cell)
        self._say(f"  {variant}, {shape}: {cell['turns']} turns")
        vague = _vaguest(cell["models"])
        if vague is not None and vague[2].half_width > self._precision:
            name, what, found = vague
            self.warn(
                f"{variant}, {shape}: {name} is {found.median:.2f} times as fast ({what.replace('_', ' ')}), known to "
                f"{found.half_width:.1%} only, not to {self._precision:.1%}: the machine is busy, or --minutes too few"
            )
        return shape

    def _halved(self, subjects: dict[str, Any], variant: Variant, shape: Shape) -> Shape | None:
        for subject in subjects.values():
            subject.open_again(self._until)
        self._leave_out(variant, [shape], "it does not fit into memory")
        smaller = Shape(shape.batch // 2, shape.length)
        way_out = f"the batch is {smaller.batch} instead" if smaller.batch else "not even one prompt fits"
        self._say(f"  out of memory: {variant}, {shape} does not fit: {way_out}")
        return smaller if smaller.batch else None

    def _leave_out(self, variant: Variant, shapes: Sequence[Shape], why: str) -> None:
        self.left_out.append({**variant._asdict(), "shapes": [str(shape) for shape in shapes], "why": why})


class _Pace:
    """How long a turn of all models takes, from the shapes that were measured before."""

    def __init__(self) -> None:
        self._per_prompt_token, self._per_sequence = 0.0, 0.0

    def add(self, shape: Shape, turn: Sequence[Record]) -> None:
        self._per_prompt_token = sum(one["first_token"] for one in turn) / (shape.batch * shape.length)
        self._per_sequence = STEPS * sum(one["per_token"] for one in turn) / shape.batch

    def seconds(self, shape: Shape) -> float:
        """0 before anything was measured."""
        return shape.batch * (shape.length * self._per_prompt_token + self._per_sequence)


def take_turns(subjects: dict[str, Any], shape: Shape, until: float, precision: float, pace: _Pace) -> Turns:
    """Turns of every model after one that is not counted; raises `OutOfTime` before there are three."""
    share = time.monotonic() + _SHARE * (until - time.monotonic())
    for subject in subjects.values():
        subject.forget_peak(until)
    pace.add(shape, [subject.turn(shape, until) for subject in subjects.values()])
    names, turns = list(subjects), {name: [] for name in subjects}
    for number in range(_MOST):
        first = number % len(names)
        try:
            turn = {name: subjects[name].turn(shape, until) for name in names[first:] + names[:first]}
        except OutOfTime:
            if number < _FEWEST:
                raise
            break
        for name, found in turn.items():
            turns[name].append(found)
        if number + 1 >= _USUAL and _is_precise(turns, precision):
            break
        if number + 1 >= _FEWEST and time.monotonic() > share:
            break
    return turns


def _is_precise(turns: Turns, precision: float) -> bool:
    reference = next(iter(turns))
    compared = [name for name in turns if name != reference] or [reference]
    return all(_ratio(turns, name, what).half_width <= precision for name in compared for what in _TIMES)


def _ratio(turns: Turns, name: str, what: str) -> Estimate:
    """How many times as fast as the first model, from pairs of the same turn; of the first model, its own time."""
    reference = next(iter(turns))
    if name == reference:
        return estimate([one[what] for one in turns[name]])
    pairs = zip(turns[reference], turns[name], strict=True)
    return estimate([theirs[what] / own[what] for theirs, own in pairs])


def summarize(turns: Turns, memory: dict[str, Record], shape: Shape) -> Record:
    """What a cell says about each model; a ratio is None of the first, which the others are compared with."""
    reference = next(iter(turns))
    found = {}
    for name, taken in turns.items():
        times = {what: estimate([one[what] for one in taken]) for what in _TIMES}
        found[name] = {
            "seconds": {what: one.as_dict() for what, one in times.items()},
            "tokens_per_second": {
                "prompt": shape.batch * shape.length / times["first_token"].median,
                "generated": shape.batch / times["per_token"].median,
            },
            "times_as_fast": None
            if name == reference
            else {what: _ratio(turns, name, what).as_dict() for what in _TIMES},
            **memory[name],
        }
    return {"turns": len(turns[reference]), "models": found}


def _vaguest(found: dict[str, Record]) -> tuple[str, str, Estimate] | None:
    """The ratio of the widest interval: whose, of which time."""
    ratios = [
        (name, what, Estimate(**ratio))
        for name, one in found.items()
        for what, ratio in (one["times_as_fast"] or {}).items()
    ]
    return max(ratios, key=lambda one: one[2].half_width, default=None)
