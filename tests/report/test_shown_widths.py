"""Neurons in what is shown of a plan: tables, picture, page, and the dry run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsekd import compression, pipeline, report
from sparsekd.compression import widths
from sparsekd.recipe import load_recipe
from sparsekd.report import html, plots, tables


def planned(make_model: Any, *, known: bool) -> compression.Plan:
    """Widths by layer, with a predicted damage that stands at one matrix of each MLP."""
    even = widths.uniform(make_model("gpt2"), 0.5, 1, "x")
    made = widths.plan_of(even, {"transformer.h.0.mlp": 96, "transformer.h.1.mlp": 32})
    kl = [None, 0.25, None, 0.5] if known else [None] * 4
    lines = [replace(line, predicted_kl=one) for line, one in zip(made.matrices, kl, strict=True)]
    return replace(made, matrices=lines, predicted_kl=0.75 if known else None)


def heights(picture: str) -> list[list[float]]:
    """The heights of the points of each line with two of them, in its panel; the ground is 0."""
    lines = re.findall(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+) \n" clip-path', picture)
    return [[float(y) for y in line] for line in lines]


def test_the_picture_shows_the_neurons_of_each_layer(make_model: Any) -> None:
    alone = plots.widths(planned(make_model, known=False).as_dict())
    assert "<!-- neurons / dense width -->" in alone and "KL" not in alone
    first, second = heights(alone)[-1]
    assert first < second  # 96 neurons stand higher than 32
    both = plots.widths(planned(make_model, known=True).as_dict())
    assert "<!-- neurons / dense width -->" in both and "<!-- KL predicted (nats a token) -->" in both
    (first, second), (low, high) = heights(both)[-2:]
    assert first < second and low > high  # 0.25 nats stand lower than 0.5
    assert "nan" not in both


def test_a_row_names_the_neurons(make_model: Any) -> None:
    plan = planned(make_model, known=True).as_dict()
    assert tables.left(plan) == "neurons"
    rows = tables.matrices(plan)
    assert [row[2] for row in rows] == ["96 neurons", "96 neurons", "32 neurons", "32 neurons"]
    assert rows[0][1] == "128 x 32" and rows[0][3:5] == [f"{128 * 33:,}", f"{96 * 33:,}"]
    assert rows[3][4] == f"{32 * 32 + 32:,}"
    for line in plan["matrices"]:
        del line["neurons"], line["zeros"]  # of a version that did not have them
    assert tables.left(plan) == "sizes" and tables.matrices(plan)[0][2] == "smaller"
    plan["matrices"][0]["rank"] = 7
    assert tables.left(plan) == "ranks" and tables.matrices(plan)[0][2] == "rank 7"


def test_the_page_shows_them(tiny_recipe: Path, make_model: Any, tmp_path: Path) -> None:
    pipeline.run(load_recipe(str(tiny_recipe)), tmp_path / "run")
    gathered = report.gather(tmp_path / "run")
    gathered["compression"] = planned(make_model, known=True).as_dict()
    assert tables.allocations(gathered) is None
    page = html.render(gathered)
    assert "Widths: " not in page
    assert "<h2>Neurons by layer</h2>" in page and "96 neurons" in page and "add up to\n0.750" in page
    assert "neurons / dense width" in page and "rank / full rank" not in page
    gathered["compression"]["predicted_kl_by_allocation"] = {"global": 0.75, "uniform": 0.875}
    gathered["recipe"]["compress"] |= {"method": "neurons", "neurons": {"allocation": "global"}}
    sentence = tables.allocations(gathered)
    assert sentence is not None and f"Widths: {sentence}." in html.render(gathered)


def test_the_other_allocation_is_named_with_its_price(make_model: Any) -> None:
    plan = planned(make_model, known=True).as_dict()
    plan["predicted_kl_by_allocation"] = {"global": 0.2561, "uniform": 0.2962}
    assert widths.compared(plan, "neurons", "global") == (
        "predicted KL 0.256 with a width a layer; one width, an ordinary checkpoint, would be 0.296 "
        "(compress.neurons.allocation=uniform)"
    )
    assert widths.compared(plan, "neurons", "uniform") == (
        "predicted KL 0.296 with one width, an ordinary checkpoint; a width a layer would be 0.256 "
        "(compress.neurons.allocation=global)"
    )
    plan["matrices"][-1]["in_features"] -= 32  # a round before took neurons out of this MLP
    assert "one width, but for MLPs that are narrower, would be 0.296" in widths.compared(plan, "neurons", "global")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_dry_run_knows_them(flags: Any, sparsekd: Any, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_for(model: Any, section: Any) -> compression.Plan:
        return widths.uniform(model, section.reduction, 8, section.method)

    monkeypatch.setattr(compression, "plan_for", plan_for)
    outcome = sparsekd("run", tiny_recipe, "--dry-run", "--reduction", "0.3", *flags)
    assert outcome.code == 0, outcome
    if flags:
        assert {line["neurons"] for line in outcome.json["compression"]["matrices"]} == {40}
        assert outcome.json["peak_memory_bytes"] > 0
    else:
        assert "40 neurons" in outcome.out and "about" in outcome.out
