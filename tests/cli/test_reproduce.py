"""`sparsekd reproduce`: what an experiment would cost."""

from pathlib import Path
from typing import Any

import pytest
from commands import snapshot


def test_dry_run_of_an_experiment(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsekd.run.dry_run.measured_flops", lambda placement: 1e9)  # the same speed each time
    before = snapshot(tmp_path)

    def seconds(experiment: str, seeds: str, rates: str) -> dict[str, float]:
        dry = ("--dry-run", "--json", "--set", "rounds=[0.3,0.5]", "--out", tmp_path / "run")
        outcome = sparsekd("reproduce", experiment, tiny_recipe, "--seeds", seeds, "--rates", rates, *dry)
        assert outcome.code == 0, outcome.err
        assert outcome.json["compression"]["mlp_reduction"] >= 0.5
        assert outcome.json["arms"][:4] == ["Dense+KD", "Dense+KD equal tokens", "round 30%", "round 50%"]
        return outcome.json["seconds"]

    one, two, searched = seconds("III", "1", "1e-3"), seconds("III", "1,2", "1e-3"), seconds("III", "1", "1e-3,1e-4")
    assert two["cache"] == one["cache"]  # the teacher is asked once
    assert all(two[stage] == pytest.approx(2 * one[stage]) for stage in ("compress", "distill", "evaluate"))
    # three arms of 12 blocks forward and back and one of 24, each with 2 validated three times
    block = one["distill"] / (3 * (3 * 12 + 24) + 4 * 2 * 3)
    assert searched["distill"] - one["distill"] == pytest.approx(4 * 2 * (3 * 12 / 4 + 2 * 2) * block)
    taught = seconds("IV", "1,2", "1e-3")  # a teacher more for each seed, and no pruned model more
    assert taught["cache"] == pytest.approx(3 * one["cache"]) and taught["compress"] == pytest.approx(two["compress"])
    printed = sparsekd("reproduce", "III", tiny_recipe, "--dry-run").out
    arms = "Dense+KD, Dense+KD equal tokens, round 15%, round 35%, round 51%, round 65%"
    assert f"arms          {arms}" in printed and "total" in printed
    wrong = sparsekd("reproduce", "IX", tiny_recipe, "--dry-run")
    assert wrong.code == 2 and "experiment IX: expected one of" in wrong.err
    assert snapshot(tmp_path) == before
