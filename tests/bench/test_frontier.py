"""Perplexity against cost: which points are dominated; a run's own frontier, measured, in its report, by the verb."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsekd import models, pipeline
from sparsekd.bench import frontier
from sparsekd.bench.points import COSTS, _is_dominated
from sparsekd.errors import ResourceError, UsageError
from sparsekd.evaluate import perplexity, perplexity_in
from sparsekd.recipe import load_recipe
from sparsekd.report import frontier as shown

PLAIN = {"hf": ("torch", ())}  # nothing in fewer bits: each export takes seconds


def point(perplexity: float, cost: float | None) -> dict[str, Any]:
    return {"perplexity": perplexity, "bytes": cost}


def test_what_is_dominated() -> None:
    points = [point(10, 4), point(11, 2), point(11, 3), point(12, 1), point(12, 1), point(9, None)]
    assert [_is_dominated(one, points, "bytes") for one in points] == [False, False, True, False, False, False]


def test_perplexity_in_a_runtime_is_the_model_s(make_model: Any, tokenizer: Any) -> None:
    model, text = make_model("llama").eval(), "Silver river quiet.\n" * 40
    options = {"context": 32, "stride": 16, "max_tokens": 100}
    vocab_size = models.real_vocab_size(model, tokenizer)
    found = perplexity_in(lambda tokens: model(tokens).logits.detach(), vocab_size, tokenizer, text, **options)
    expected = perplexity(model, tokenizer, text, **options)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.window_tokens == expected.window_tokens and found.bits_per_byte > 0


def test_a_run_measures_it(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any, sparsekd: Any, refused: Any) -> None:
    monkeypatch.setattr("sparsekd.bench.points._IN_FEWER_BITS", PLAIN)
    run = tmp_path / "run"
    pipeline.run(load_recipe(str(tiny_recipe), ("bench=true", "compress.reduction=0.5")), run)
    found = json.loads((run / "report.json").read_text())["bench"]
    points = found["points"]
    assert [(one["model"], one["weights"]) for one in points] == [
        ("dense", "float32"),
        ("run: whitened 50%", "float32"),
    ]
    assert points[0]["ratio"] == 1 and points[1]["ratio"] != 1
    assert points[1]["bytes"] < points[0]["bytes"] and points[1]["parameters"] < points[0]["parameters"]
    assert all(one[cost] > 0 for one in points for cost in COSTS)
    assert not all(one["dominated"][cost] for one in points for cost in COSTS)
    page = (run / "report.html").read_text()
    assert "Quality against cost" in page and page.count("PyTorch") >= 2
    stage = (run / "bench" / "stage.json").read_bytes()
    pipeline.run(load_recipe(str(tiny_recipe), ("bench=true", "compress.reduction=0.5")), run)
    assert (run / "bench" / "stage.json").read_bytes() == stage  # reused

    asked: list[Any] = []

    def measured(candidates: Any, text: str, folder: Path, **options: Any) -> dict[str, Any]:
        asked.append(([one.title for one in candidates], text, options["tokens"], options["minutes"]))
        return {key: value for key, value in found.items() if key != "text"}

    monkeypatch.setattr("sparsekd.bench.frontier", measured)  # which takes its time, once is enough
    out, text = tmp_path / "out", (run / "corpus" / "text-other.txt").read_text()
    printed = sparsekd("frontier", run, run, "--text", "other", "--tokens", 100, "--out", out)
    assert printed.code == 0, printed
    assert asked == [(["dense", "run: whitened 50%"], text, 100, 5.0)]
    assert json.loads((out / "frontier.json").read_text())["text"] == "other"
    assert "Quality against cost" in printed.out and "whitened 50%" in printed.out
    assert "<svg" in (out / "frontier.svg").read_text()
    line = refused("frontier", run, "--text", "none", error=UsageError)
    assert f"--text none: {run} evaluates on held, other" in line


def test_the_table_says_what_a_point_is_best_for() -> None:
    one = {"model": "dense", "runtime": "torch", "weights": "float32", "perplexity": 20.0, "ratio": 1.0, "bytes": 4}
    one |= {"first_token": 0.2, "per_token": None, "dominated": dict.fromkeys(COSTS, False)}
    other = one | {"dominated": dict.fromkeys(COSTS, True)}
    table = next(iter(shown.tables({"points": [one, other], "device": "cpu", "threads": 2})))
    assert [row[-1] for row in table.rows] == ["prompt, bytes", "nothing"]
    assert len(re.findall("opacity: 0.3", shown.picture({"points": [one, other]}))) > 0


def test_what_is_refused(refused: Any, model_folder: Any, tiny_recipe: Path, monkeypatch: Any, tmp_path: Path) -> None:
    assert "is no run: expected the --out of sparsekd run" in refused(
        "frontier", model_folder("llama"), error=UsageError
    )
    with pytest.raises(UsageError, match="--format hf: expected one of openvino, onnx, gguf"):
        frontier([], "", tmp_path, format_="hf")
    monkeypatch.setattr("sparsekd.bench.points._install_line", lambda name: "pip install it")
    recipe = load_recipe(str(tiny_recipe), ("bench=true",))
    with pytest.raises(ResourceError, match="fewer bits need another runtime than PyTorch"):
        pipeline.check_before_starting(recipe)
    with pytest.raises(ResourceError, match="format onnx has no runtime here: pip install it"):
        frontier([], "", tmp_path, format_="onnx")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="bench: true needs a text"):
        pipeline.check_before_starting(replace(recipe, evaluate=replace(recipe.evaluate, texts={})))
