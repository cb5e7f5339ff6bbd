"""Stage `evaluate` on tiny real models: what the report shows, what is made again, and what memory can be saved."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekd import SparseKDError, corpus, pipeline
from sparsekd.evaluate import harness
from sparsekd.recipe import load_recipe

TASKS = ("evaluate.tasks=[local_lambada, local_piqa]", "evaluate.task_limit=4", "evaluate.skip_missing_tasks=true")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "tasks" / "lambada_openai_test.jsonl"
    path.parent.mkdir()
    path.write_text(
        "\n".join(json.dumps({"context": f"The quiet river {i}", "continuation": "bridge"}) for i in range(9))
    )
    return path


def report_of(folder: Path, recipe: Path, *overrides: str) -> dict[str, Any]:
    pipeline.run(load_recipe(str(recipe), overrides), folder)
    return json.loads((folder / "report.json").read_text())


def test_everything_measured_is_in_the_report(tiny_recipe: Path, rows: Path, tmp_path: Path) -> None:
    found = report_of(tmp_path / "run", tiny_recipe, *TASKS)["evaluation"]
    assert list(found["models"]) == list(found["tasks"]) == ["dense", "compressed", "distilled"]
    for name, texts in found["models"].items():
        for result in texts.values():
            bins = result["calibration"]["bins"]
            assert sum(b["num_tokens"] for b in bins) == result["num_tokens"]
            assert (result["agreement"] is None) == (name == "dense")
            if name != "dense":
                assert result["agreement"]["kl"]["value"] > 0
                assert sum(b["num_tokens"] for b in result["agreement"]["by_frequency"]) == result["num_tokens"]
    assert found["tasks"]["distilled"]["local_lambada"]["num_rows"] == 4
    assert "piqa_val.jsonl: no such file" in found["tasks"]["dense"]["local_piqa"]["skipped"]
    page = (tmp_path / "run" / "report.html").read_text()
    for heading in ("Does it know what it does not know?", "How far from the dense model?", "<h2>Tasks</h2>"):
        assert heading in page
    assert "piqa_val.jsonl: no such file" in page


def test_what_was_measured_already_is_kept(tiny_recipe: Path, rows: Path, tmp_path: Path) -> None:
    """As after a kill: the stages are not finished, one text and one model's tasks are missing."""
    folder = tmp_path / "run" / "round-01"
    before = report_of(tmp_path / "run", tiny_recipe, *TASKS)["evaluation"]
    kept = [folder / "eval/dense-text-held.json", folder / "compressed/tasks/stage.json"]
    lost = [folder / "eval/distilled-text-other.json", tmp_path / "run/dense/tasks/stage.json"]
    times = [path.stat().st_mtime_ns for path in kept]
    for path in (folder / "eval/stage.json", *lost):
        path.unlink()
    after = report_of(tmp_path / "run", tiny_recipe, *TASKS)["evaluation"]
    for key in ("models", "tasks", "ratios"):
        assert after[key] == before[key]
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_one_model_at_a_time_measures_the_same_without_agreement(tiny_recipe: Path, tmp_path: Path) -> None:
    together = report_of(tmp_path / "together", tiny_recipe)["evaluation"]["models"]
    alone = report_of(tmp_path / "alone", tiny_recipe, "evaluate.agreement=false")["evaluation"]["models"]
    for texts in together.values():
        for result in texts.values():
            result["agreement"] = None
    assert alone == together
    assert "How far from the dense model?" not in (tmp_path / "alone" / "report.html").read_text()


def test_of_one_window_errors_are_unknown_and_left_out(tiny_recipe: Path, tmp_path: Path) -> None:
    found = report_of(tmp_path / "run", tiny_recipe, "evaluate.max_tokens=32", "rounds=[0.3, 0.5]")
    for name in ("dense", "compressed", "distilled"):
        result = found["evaluation"]["models"][name]["held"]
        assert len(result["window_tokens"]) == 1
        assert result["standard_error"] is result["paper_standard_error"] is None
        assert result["calibration"]["brier"]["standard_error"] is None
    assert found["evaluation"]["ratios"]["distilled"]["held"]["standard_error"] is None
    page = (tmp_path / "run" / "report.html").read_text()
    cells = re.findall("<td>(.*?)</td>", page)
    assert f"{result['perplexity']:.2f}" in cells and f"{result['agreement']['kl']['value']:.3f}" in cells
    assert not any("\u00b1" in cell for cell in cells)


def test_a_missing_task_stops_the_run_before_it_starts(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), ("evaluate.tasks=[local_lambada]",))
    with pytest.raises(SparseKDError, match=r"lambada_openai_test\.jsonl: no such file"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_rows_under_a_finished_evaluation_are_scored_again(tiny_recipe: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = report_of(folder, tiny_recipe, *TASKS)["evaluation"]
    texts = folder / "round-01/eval/stage.json"
    measured = texts.stat().st_mtime_ns
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    after = report_of(folder, tiny_recipe, *TASKS)["evaluation"]
    assert [one["tasks"]["dense"]["local_lambada"]["num_rows"] for one in (before, after)] == [4, 2]
    assert texts.stat().st_mtime_ns == measured


def test_a_local_task_that_was_skipped_is_scored_when_its_file_is_there(
    tiny_recipe: Path, rows: Path, tmp_path: Path
) -> None:
    skipped = report_of(tmp_path / "run", tiny_recipe, *TASKS)["evaluation"]["tasks"]["dense"]["local_piqa"]
    assert "no such file" in skipped["skipped"]
    row = {"goal": "Open a letter", "sol1": "with a knife", "sol2": "with a whale", "label": 0}
    (rows.parent / "piqa_val.jsonl").write_text(json.dumps(row) + "\n")
    scored = report_of(tmp_path / "run", tiny_recipe, *TASKS)["evaluation"]["tasks"]["dense"]["local_piqa"]
    assert scored["skipped"] is None and scored["num_rows"] == 1


def test_a_hub_task_that_was_skipped_is_tried_again(
    tiny_recipe: Path, rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[list[str]] = []
    original = harness.run_tasks

    def watched(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> Any:
        asked.append(list(tasks))
        known = [task for task in tasks if task != "piqa"]
        skipped = {} if len(known) == len(tasks) else {"piqa": harness.TaskResult({}, 0, "no network")}
        return (original(model, tokenizer, known, **options) if known else {}) | skipped

    monkeypatch.setattr(harness, "run_tasks", watched)
    monkeypatch.setattr(harness, "texts", lambda *_, **__: {})
    tasks = ("evaluate.tasks=[local_lambada,piqa]", "evaluate.skip_missing_tasks=true")
    report_of(tmp_path / "run", tiny_recipe, *tasks)
    assert asked == 3 * [["local_lambada", "piqa"]]
    found = report_of(tmp_path / "run", tiny_recipe, *tasks)["evaluation"]["tasks"]["dense"]
    assert asked[3:] == 3 * [["piqa"]] and found["local_lambada"]["num_rows"] == 9


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_a_tasks_rows_are_kept_out_of_training(
    when: str, tiny_recipe: Path, rows: Path, text_file: Path, tmp_path: Path
) -> None:
    passage = max(text_file.read_text().split("\n\n")[:100], key=len)
    if when == "later":
        report_of(tmp_path / "run", tiny_recipe)
        [identifier, *_] = corpus.load(tmp_path / "run/corpus").blocks[0].documents
        passage = text_file.read_text().split("\n\n")[int(identifier.rpartition(":")[2])]
    rows.write_text(json.dumps({"context": passage, "continuation": "end"}) + "\n")
    with pytest.raises(SparseKDError, match=r"corpus\.sources\.learn \(evaluate\.tasks\.local_lambada\)"):
        report_of(tmp_path / "run", tiny_recipe, "evaluate.tasks=[local_lambada]")


@pytest.mark.parametrize("change", ["seed=42", "rounds=[0.1, 0.3]"])
def test_a_recipe_without_texts_ends_with_a_report_that_says_so(
    change: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    """`evaluate.texts` is empty by default; all the work ended in a picture with no axes."""
    values = yaml.safe_load(tiny_recipe.read_text())
    del values["evaluate"]
    tiny_recipe.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    outcome = sparsekd("run", tiny_recipe, "--out", out, "--set", change)
    assert outcome.code == 0
    assert "perplexity: not measured" in outcome.out
    page = (out / "report.html").read_text()
    assert "names no text in <code>evaluate.texts</code>" in page
    assert "Brier" not in page
    assert ("Round by round" in page) == ("rounds" in change)
