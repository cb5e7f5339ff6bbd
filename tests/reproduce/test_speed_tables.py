"""The paper's tables of speed on a tiny model: what is made and used again, what is claimed, what the page shows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsekd import bench, errors
from sparsekd.recipe import load_recipe
from sparsekd.report import experiments
from sparsekd.reproduce import preview, reproduce, speed
from sparsekd.reproduce.arms import EXPERIMENTS

CUTS = ["one shot 35%", "one shot 65%"]


def run(experiment: str, recipe: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return reproduce(experiment, load_recipe(str(recipe), overrides), folder)


def weights(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}


def ratio(median: float, low: float, high: float, confidence: float = 0.97) -> dict[str, float]:
    return {"median": median, "low": low, "high": high, "confidence": confidence}


def test_the_paper_s_ratios() -> None:
    """Its Tables VII and VIII give both milliseconds and what follows from them."""
    printed = {1: [(1.02, 1.02), (1.00, 1.00)], 16: [(1.14, 1.18), (1.15, 1.09)], 64: [(1.11, 0.94), (1.17, 1.00)]}
    for batch, by_cut in printed.items():
        found = [speed.TABLES["VII"].paper[str(batch)][name] for name in CUTS]
        assert [(round(one["first_token"], 2), round(one["per_token"], 2)) for one in found] == by_cut
    kernels = speed.TABLES["VIII"].paper.values()
    shares = [(round(100 * one["attention_share"]), round(100 * one["products_share"])) for one in kernels]
    assert shares == [(16, 53), (18, 49), (19, 46)]


@pytest.mark.parametrize(
    ("found", "above", "below", "expected"),
    [
        (ratio(1.2, 1.11, 1.3), 1.1, None, "holds"),
        (ratio(1.2, 1.1, 1.3), 1.1, None, "not decided"),
        (ratio(1.0, 0.9, 1.1), 1.1, None, "does not hold"),
        (ratio(1.0, 0.96, 1.04), 0.95, 1.05, "holds"),
        (ratio(1.0, 0.94, 1.04), 0.95, 1.05, "not decided"),
        (ratio(2.0, 1.05, 3.0), 0.95, 1.05, "does not hold"),
        (ratio(1.0, 0.96, 1.04, confidence=0.75), 0.95, 1.05, "not decided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(found: Any, above: Any, below: Any, expected: str) -> None:
    assert speed.verdict({"ratio": found, "above": above, "below": below}) == expected


def test_kernels_and_attention_share_the_cuts(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run("VIII", tiny_recipe, out, "evaluate.texts.held=null", "evaluate.texts.other=null")
    assert found == json.loads((out / "reproduce-VIII.json").read_text())
    made = weights(out)
    assert {str(path.relative_to(out)) for path in made} == {
        "arms/dense/model/model.safetensors",
        "arms/one-shot-35/seed-42/compressed/model/model.safetensors",
        "arms/one-shot-65/seed-42/compressed/model/model.safetensors",
    }
    assert not list(out.rglob("distilled")) and not (out / "arms/teacher").exists()  # nothing was trained
    assert list(found["arms"]) == CUTS and found["arms"]["one shot 65%"]["mlp_reduction"] >= 0.65
    assert [row["model"] for row in found["measured"]["rows"]] == ["dense", *CUTS]
    for name, bound in zip(CUTS, found["measured"]["bounds"], strict=True):
        attention, products, achieved = (claim for claim in found["claims"] if claim["of"] == name)
        assert attention["ratio"] == found["measured"]["by_kind"][name]["attention"]
        assert products["above"] < bound["arithmetic_reduction"] < products["below"]
        assert achieved["ratio"]["median"] == pytest.approx(bound["achieved"]) and achieved["above"] == 0.9
    page = (out / "reproduce-VIII.html").read_text()
    assert (
        "Table VIII on" in page
        and "<td>53%</td>" in page
        and "Prompts are 16 x 128, for the paper&#39;s 64 x 512" in page
    )

    together = run("X", tiny_recipe, out)
    assert weights(out) == made  # used again
    assert list(together["arms"]) == CUTS[1:]
    claims = {claim["claim"]: claim for claim in together["claims"]}
    both = claims["both gain the product of what each gains"]
    assert both["ratio"] == together["measured"]["together"][0]["both_to_product"]
    assert claims["... whatever the attention"]["ratio"] == together["measured"]["bounds"][0]["times_as_fast"]
    titles = [table.title for table in experiments.all_tables(together)]
    assert titles[0] == "What the paper claims" and "Times as fast by other attention" in titles[-1]

    shutil.rmtree(out / "arms/one-shot-65/seed-42/compressed/model")  # as of finished arms that were copied
    with pytest.raises(
        errors.DataError, match=r"one-shot-65.* is missing; remove .*compressed to make the stage again"
    ):
        run("X", tiny_recipe, out)


def test_serving_by_the_command(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(EXPERIMENTS, "VII", EXPERIMENTS["X"])  # of one cut: each model starts a process
    monkeypatch.setattr(speed, "BATCHES", (1, 16))
    monkeypatch.setattr(speed, "LENGTH", 8)
    monkeypatch.setattr(speed, "MINUTES", 0.5)
    printed = sparsekd("reproduce", "VII", tiny_recipe, "--out", tmp_path / "run")
    assert printed.code == 0, printed.err
    found = json.loads((tmp_path / "run/reproduce-VII.json").read_text())
    cells = found["measured"]["cells"]
    assert [(cell["batch"], list(cell["models"])) for cell in cells] == [
        (1, ["dense", *CUTS[1:]]),
        (16, ["dense", *CUTS[1:]]),
    ]
    assert [claim["below"] for claim in found["claims"]] == [1.05, 1.05, None, 1.3]
    larger = cells[1]["models"]["one shot 65%"]["times_as_fast"]["first_token"]
    assert [claim["ratio"] for claim in found["claims"][2:]] == [larger] * 2
    beside, *_ = experiments.all_tables(found)
    assert [row[:2] for row in beside.rows] == [["1 x 8", "one shot 65%"], ["16 x 8", "one shot 65%"]]
    assert beside.rows[1][3::2] == ["1.15", "1.09", "0.86"]  # in the paper: 48.51 and 33.36 ms, 2.03 GB
    assert "16 prompts or more gain" in printed.out and "On disk" in printed.out
    page = (tmp_path / "run/reproduce-VII.html").read_text()
    assert "nothing was trained" in page and "RTX 5070 Ti" in page


def test_a_dry_run_has_the_stages_that_are_needed(sparsekd: Any, tiny_recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsekd.run.dry_run.measured_flops", lambda placement: 1e9)  # the same speed each time
    printed = sparsekd("reproduce", "VII", tiny_recipe, "--dry-run")
    assert f"arms          {', '.join(CUTS)}" in printed.out and "measurement   about 30 min" in printed.out
    assert "teacher cache" not in printed.out and "peak memory" not in printed.out and "distill" not in printed.out
    found = {one: preview(one, load_recipe(str(tiny_recipe))).costs for one in ("VIII", "X")}
    assert list(found["X"].seconds) == ["compress", "measurement"]
    passes = bench.PASSES * 16 * 128 * found["X"].seconds_per_token
    assert found["VIII"].seconds["measurement"] == pytest.approx(3 * passes)
    assert found["X"].seconds["measurement"] == pytest.approx(2 * 2 * passes)
    probed = load_recipe(str(tiny_recipe), ("compress.whitened.probe_tokens=64",))
    assert list(preview("X", probed).costs.seconds) == ["cache", "compress", "measurement"]
    wrong = sparsekd("reproduce", "VII", tiny_recipe, "--seeds", "42", "--dry-run")
    assert wrong.code == 2 and "experiment VII measures speed and trains nothing" in wrong.err
