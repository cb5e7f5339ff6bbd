"""The queue of long arms, stopped and gone on with, and the law that is fitted to its rows."""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd
from sparsekd.reproduce.arms import EXPERIMENTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a script of `benchmarks/`; the tables are in a folder of the test, and the experiments stay what they
    are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"])
    tables = importlib.import_module("_tables")
    monkeypatch.setattr(tables, "TABLES", tmp_path / "tables")
    return importlib.import_module


def test_a_stopped_queue_has_its_rows_and_goes_on(
    benchmark: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    long, tables = benchmark("long"), benchmark("_tables")
    monkeypatch.setattr(long, "SECONDS", 0.05)
    monkeypatch.setattr(long, "RATES", (1e-3,))
    options = ["--recipe", str(tiny_recipe), "--budgets", "384", "768", "--only", "magnitude"]
    options += ["--set", "rounds=[0.3,0.5]", "corpus.num_validation_blocks=2"]
    monkeypatch.setattr(sys, "argv", ["long.py", str(tmp_path), str(tmp_path / "runs"), *options])
    curve = tmp_path / "runs/384/arms/magnitude-50/seed-42/distilled/metrics.jsonl"

    def stop_in_training() -> None:
        while not curve.exists() or curve.read_text().count('"validation"') < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_training, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        long.main()
    assert stopped.value.code == 128 + signal.SIGTERM
    rows = {row["arm"]: row for row in tables.read("trained", run="long-384")}
    assert list(rows) == ["magnitude-30", "magnitude-50"]  # the control comes after them
    assert rows["magnitude-30"]["stop_reason"] == "all 1 epochs are done"
    assert rows["magnitude-50"]["stop_reason"] == "still training" and len(rows["magnitude-50"]["validations"]) > 1
    assert {row["arm"] for row in tables.read("measured", run="long-384")} == {"dense", "magnitude-30"}

    long.main()
    rows = {(row["run"], row["arm"], row["seed"]): row for row in tables.read("trained")}
    assert len(rows) == 3 * 3 + 3  # three seeds of the first budget, one of the second
    assert all(row["stop_reason"] == "all 1 epochs are done" for row in rows.values())
    assert [rows[f"long-{budget}", "magnitude-50", 42]["tokens"] for budget in (384, 768)] == [384, 768]

    monkeypatch.setattr(sys, "argv", [*sys.argv, "distill.alpha=0.75"])
    with pytest.raises(SystemExit) as refused:
        long.main()
    assert refused.value.code == 3


def test_one_reduction_comes_first_and_others_join_it(
    benchmark: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
):
    long, tables = benchmark("long"), benchmark("_tables")
    monkeypatch.setattr(long, "RATES", (1e-3,))
    options = ["--recipe", str(tiny_recipe), "--budgets", "384", "--only", "magnitude", "--seeds"]
    monkeypatch.setattr(
        sys, "argv", ["long.py", str(tmp_path), str(tmp_path / "runs"), *options, "1", "--set", "rounds=[0.5]"]
    )
    long.main()
    first = {row["arm"]: row for row in tables.read("measured")}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "rounds=[0.3,0.5]"])
    long.main()
    rows = {row["arm"]: row for row in tables.read("measured")}
    assert set(rows) == {"dense", "Dense+KD", "magnitude-30", "magnitude-50"}
    assert rows["magnitude-50"]["perplexity"] == first["magnitude-50"]["perplexity"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "1", "2"])
    with pytest.raises(SystemExit):
        long.main()


def test_beside_each_arm_one_whose_embeddings_stay(
    benchmark: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    long, tables = benchmark("long"), benchmark("_tables")
    monkeypatch.setattr(long, "RATES", (1e-3,))
    options = ["--recipe", str(tiny_recipe), "--budgets", "384", "--only", "magnitude", "--seeds", "1", "--frozen"]
    monkeypatch.setattr(
        sys, "argv", ["long.py", str(tmp_path), str(tmp_path / "runs"), *options, "--set", "rounds=[0.5]"]
    )
    long.main()
    arms = ["magnitude-50", "magnitude-50-frozen", "Dense+KD", "Dense+KD-frozen"]
    assert {row["arm"] for row in tables.read("trained")} == set(arms)

    def embeddings(arm: str, stage: str = "distilled") -> torch.Tensor:
        folder = tmp_path / "runs" / "384" / "arms" / arm / "seed-42" / stage / "model"
        return sparsekd.load(str(folder))[0].get_parameter("model.embed_tokens.weight")

    before = embeddings("magnitude-50", "compressed")
    assert torch.equal(embeddings("magnitude-50-frozen"), before)
    assert torch.equal(embeddings("Dense+KD-frozen"), before)
    assert not torch.equal(embeddings("magnitude-50"), before)


def test_the_queue_wants_its_runs_elsewhere(benchmark: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["long.py", "data", str(BENCHMARKS / "results")])
    with pytest.raises(SystemExit):
        benchmark("long").main()
    assert "expected a folder outside of the checkout" in capsys.readouterr().err


def test_text_beyond_what_is_new_is_seen_again(benchmark: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = benchmark("long").recipe_of(str(tiny_recipe), tmp_path, 20_000_000, [])
    seen = recipe.corpus.num_blocks * recipe.corpus.seq_len
    assert recipe.distill.epochs == 7 and seen * 7 == pytest.approx(20_000_000, rel=1e-5)


def test_the_law_finds_the_constants_of_its_points(benchmark: Any) -> None:
    law = benchmark("law")
    known = law.Law(gamma=1.5, floor=0.4, scale=30.0, beta=0.3, error=0.0)
    arms = [
        law.Arm(f"{r}-{n}", 42, [(r, n / 2, known.gap(r, n / 2)), (r, n, known.gap(r, n))])
        for r in (0.15, 0.35, 0.65)
        for n in (16_384.0, 61_440.0, 1.2e6)
    ]
    for of_ends in (True, False):
        found = law.described(arms, of_ends)
        assert found["law"]["gamma"] == pytest.approx(1.5) and found["law"]["beta"] == pytest.approx(0.3)
        assert found["law"]["floor"] == pytest.approx(0.4) and found["law"]["error"] < 1e-9
        assert found["error_left_out"] < 1e-6 and len(found["ends"]) == 9
        assert found["tokens_for"]["1.2 at 0.35"] == pytest.approx(known.tokens_for(0.35, 0.18232), rel=1e-3)
        assert found["tokens_for"]["1.6 at 0.65"] > 0 and known.tokens_for(0.65, 0.1) is None


def test_the_law_wants_enough_arms(benchmark: Any) -> None:
    law = benchmark("law")
    points = [(0.35, 1e4 * n, 1 / n) for n in range(1, 5)]
    with pytest.raises(ValueError, match=r"4 points of 1 reductions and 4 budgets .* expected at least 5 of 2 and 2"):
        law.fit(points)
    with pytest.raises(ValueError, match=r"a gap of -0\.100 nats is not above zero"):
        law.fit([*points, (0.15, 1e4, -0.1), (0.15, 2e4, 0.1)])
    with pytest.raises(ValueError, match="nowhere/arm: no training with a Dense"):
        law.arms_of("nowhere", "arm")
