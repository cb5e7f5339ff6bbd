"""What people see while it runs, on stderr: a live bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class Bar:
    """Progress towards `total` units; `advance` says how far, and what to show beside it.

    The time that is left follows from the speed since the first `advance`, which may hold what was done before, in a
    run that goes on.
    """

    def __init__(self, console: RichConsole, title: str, total: int, progress: Progress | None):
        self._console, self._title, self._total, self._progress = console, title, max(1, total), progress
        self._task = progress.add_task(title, total=self._total, note="") if progress else None
        self._done, self._last_line = 0, time.monotonic()
        self._first: tuple[float, int] | None = None  # the first advance: when, and how much was done by then

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        self._first = self._first or (now, self._done)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, note=note)
        elif now - self._last_line > _LINE_EVERY_S or self._done >= self._total:
            self._last_line = now
            line = f"  {self._title} {min(1.0, self._done / self._total):4.0%}  {note}"
            start, before = self._first
            if self._done > before:
                left = (now - start) / (self._done - before) * max(0, self._total - self._done)
                line += f"  {left:.0f} s left"
            self._console.print(line, markup=False, highlight=False)


class Console:
    """Human text to stderr, so that stdout stays free for results."""

    def __init__(self, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, quiet=quiet)

    def say(self, text: str) -> None:
        self._rich.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"  warning: {text}")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        if not self._rich.is_terminal:
            yield Bar(self._rich, title, total, None)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as progress:
            yield Bar(self._rich, title, total, progress)
