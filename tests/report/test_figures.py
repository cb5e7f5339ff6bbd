"""Pictures of the experiments: what has to be in them, whatever the recipe measures."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekd.report import figures, html, plots

TABLES = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "_tables.py"))
MORE = {"gsm8k": "c4", "code": "wikitext2", "stories": "c4"}


def test_axes_stand_in_rows_of_three():
    figure, axes = plots.figures(5)
    assert len(axes) == len(figure.axes) == 5
    tops = [round(one.get_subplotspec().rowspan.start) for one in axes]
    assert tops == [0, 0, 0, 1, 1]


def test_every_text_of_five_has_its_panel_and_its_bars():
    found = _with_more_texts(_recorded("controls"))
    made = figures.all_figures(found)
    for title in ("What changes perplexity", "Calibration"):
        assert all(f"<!-- {text} -->" in made[title] for text in found["texts"])


@pytest.mark.parametrize("experiment", ["III", "IV", "controls"])
def test_a_page_says_which_intervals_are_unknown(experiment: str):
    found = _recorded(experiment)
    for comparison in _comparisons(found):
        comparison["interval"] = None
    page = html.render_experiment(found)
    assert page.count("<td>unknown</td>") == len(found["patterns"]) + len(found.get("attribution", []))
    assert "nan" not in page


def _recorded(experiment: str) -> dict[str, Any]:
    """What `sparsekd reproduce` found on SmolLM2-135M."""
    return TABLES["found"](*TABLES["read"]("experiments", run="rounds", experiment=experiment))


def _comparisons(part: Any) -> Iterator[dict[str, Any]]:
    """Every part of what was found that has an interval."""
    if isinstance(part, dict) and "interval" in part:
        yield part
    elif isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _comparisons(inner)


def _with_more_texts(found: dict[str, Any]) -> dict[str, Any]:
    """The results as if three more texts had been measured: each with the figures of one of the two."""
    found["texts"] += MORE
    for by_seed in found["arms"].values():
        for arm in by_seed.values():
            for results in arm["models"].values():
                results |= {text: results[like] for text, like in MORE.items()}
    found["attribution"] += [
        row | {"text": text} for row in found["attribution"] for text, like in MORE.items() if row["text"] == like
    ]
    return found
