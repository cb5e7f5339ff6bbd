"""The lines that stand for a bar where there is no terminal."""

from __future__ import annotations

import pytest

from sparsekd import console
from sparsekd.console import Console


def test_the_time_that_is_left_counts_only_what_this_call_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on at 600 of 1,000 has 400 units in front of it, and knows its speed after the next ones."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Console().bar("training", 1000) as bar:
        for now, count in ((20.0, 600), (40.0, 100), (60.0, 300)):  # noqa: B007 (the clock reads it)
            bar.advance(count, "note")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["training 60% note", "training 70% note 60 s left", "training 100% note 0 s left"]
