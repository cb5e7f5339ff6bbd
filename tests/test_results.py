"""The recorded results: small, and each row's perplexity is that of its windows."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TABLES = runpy.run_path(str(RESULTS.parent / "_tables.py"))


def test_no_raw_run_directory_is_kept():
    kept = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(kept) < 60
    assert sum(path.stat().st_size for path in kept) < 2_000_000
    assert not [path for path in kept if path.name in ("stage.json", "inputs.json", "manifest.json")]


@pytest.mark.parametrize("run", sorted({row["run"] for row in TABLES["read"]("measured")}))
def test_every_perplexity_is_that_of_its_windows(run: str):
    for by_text in TABLES["results"](run).values():
        for result in by_text.values():
            nats = sum(result["window_nll"]) / sum(result["window_tokens"])
            assert math.exp(nats) == pytest.approx(result["perplexity"], rel=1e-8)


def test_a_row_replaces_that_of_the_same_key(tmp_path: Path):
    there = TABLES["add"].__globals__
    there["TABLES"], before = tmp_path, there["TABLES"]
    try:
        row = {"run": "a", "arm": "dense", "seed": None}
        TABLES["add"]("trained", [row | {"tokens": 1}, row | {"arm": "b", "tokens": 2}])
        TABLES["add"]("trained", [row | {"tokens": 1 / 3}])
        assert [one["tokens"] for one in TABLES["read"]("trained")] == [0.333333333, 2]
        made = {"commit": "c", "command": "x"}
        TABLES["add"]("trained", [row | {"arm": arm, "tokens": 3} | made for arm in "ab"])
        assert TABLES["read"]("trained", arm="b") == [row | {"arm": "b", "tokens": 3} | made]
        assert len((tmp_path / "origins.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    finally:
        there["TABLES"] = before


@pytest.mark.parametrize(
    ("script", "arguments", "page_name", "least"),
    [
        ("methods_table", ["methods-trial"], "methods", 41),
        ("teaching", ["--summary", "teaching"], "teaching", 14),
        ("teaching", ["--summary", "teaching-61440"], "teaching", 5),
        ("long", ["--summary", "long-1200128"], "recovery", 5),
    ],
)
def test_a_page_has_the_tables_of_its_rows(
    script: str,
    arguments: list[str],
    page_name: str,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    importlib.import_module(script).main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    page = (RESULTS.parents[1] / "docs" / "experiments" / f"{page_name}.md").read_text(encoding="utf-8")
    assert len(printed) >= least
    assert not [line for line in printed if line not in page]
