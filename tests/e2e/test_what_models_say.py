"""How the models of a run go on from its prompts: the stage, the record and the page."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsekd import SparseKDError, pipeline, report
from sparsekd.errors import DataError
from sparsekd.evaluate import continuations
from sparsekd.recipe import load_recipe

HEADING = "<h2>What the models say</h2>"
ASKED = 'evaluate.prompts=["The <b>quiet</b> river", "A garden", "In winter", "My\\n  letter"]'


def report_of(folder: Path, recipe: Path, *overrides: str) -> dict[str, Any]:
    pipeline.run(load_recipe(str(recipe), overrides), folder)
    return json.loads((folder / "report.json").read_text())


def finished(folder: Path) -> dict[str, int]:
    """When each stage was finished."""
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("stage.json")}


def made_again(before: dict[str, int], folder: Path) -> set[str]:
    after = finished(folder)
    return {stage for stage in after if after[stage] != before.get(stage)}


def test_the_report_has_what_each_model_says_and_where_it_parts(tiny_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = report_of(folder, tiny_recipe, ASKED, "distill.learning_rate=0.01")["evaluation"]["continuations"]
    assert list(said) == ["dense", "compressed", "distilled"]
    page = (folder / "report.html").read_text()
    assert HEADING in page
    assert '<h3 class="said">The &lt;b&gt;quiet&lt;/b&gt; river</h3>' in page and "My\n  letter</h3>" in page
    parted = 0
    for records in said.values():
        assert len(records) == 4
        for one, dense in zip(records, said["dense"], strict=True):
            at = one["parts_at"]
            assert one["tokens"][:at] == dense["tokens"][:at]
            if at is None:
                assert one["text"] == dense["text"]
                continue
            parted += 1
            assert one["tokens"][at : at + 1] != dense["tokens"][at : at + 1]
            end = one["ends"][at - 1] if at else 0
            same, rest = html.escape(one["text"][:end]), html.escape(one["text"][end:])
            mark = '<strong title="parts from the dense model here">\u2016</strong>'
            assert f"<u>{same}</u>{mark}{rest}</p>" in html_of(page)
    assert parted and page.count("&#8214;</strong>") == parted


def html_of(page: str) -> str:
    """The page with its own way to write a few characters made Python's."""
    return page.replace("&#8214;", "\u2016").replace("&#39;", "&#x27;").replace("&#34;", "&quot;")


def test_other_prompts_are_asked_alone_and_none_are_left_out(tiny_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = report_of(folder, tiny_recipe)["evaluation"]
    before = finished(folder)
    found = report_of(folder, tiny_recipe, ASKED)["evaluation"]
    stages = {f"{where}/continuations" for where in ("dense", "round-01/compressed", "round-01/distilled")}
    assert made_again(before, folder) == stages
    assert found["models"] == first["models"]
    before = finished(folder)
    assert report_of(folder, tiny_recipe, "evaluate.prompts=[]")["evaluation"]["continuations"] == {}
    assert not made_again(before, folder)
    assert HEADING not in (folder / "report.html").read_text()


def test_the_dense_model_is_asked_once_for_all_rounds(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[int] = []
    generate = continuations.generate

    def watched(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(continuations, "generate", watched)
    report_of(tmp_path / "run", tiny_recipe, "rounds=[0.3,0.5]")
    assert asked == [2] * 5
    report_of(tmp_path / "run", tiny_recipe, "rounds=[0.3,0.5]")
    assert len(asked) == 5


def test_what_a_stopped_run_has_not_asked_is_named_and_asked_later(tiny_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = report_of(folder, tiny_recipe)["evaluation"]["continuations"]
    place = folder / "round-01/distilled/continuations"
    (place / "stage.json").unlink()
    with pytest.raises(DataError, match="so stage continuations is not finished: continue it with sparsekd run"):
        report.write(folder)
    before = finished(folder)
    assert report_of(folder, tiny_recipe)["evaluation"]["continuations"] == whole
    assert made_again(before, folder) == {"round-01/distilled/continuations"}
    kept = tmp_path / "kept"
    shutil.copytree(place, kept)
    report_of(folder, tiny_recipe, ASKED)
    shutil.rmtree(place)
    kept.rename(place)  # as if it had been stopped before it asked the last model anew
    with pytest.raises(DataError, match="distilled/continuations is of other prompts: continue it with sparsekd run"):
        report.write(folder)


def test_a_run_of_an_earlier_version_has_a_report_without_them(tiny_recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report_of(folder, tiny_recipe)
    for place in folder.rglob("continuations"):
        shutil.rmtree(place)
    assert report.write(folder)["evaluation"]["continuations"] == {}
    assert HEADING not in (folder / "report.html").read_text()


def test_a_prompt_that_does_not_fit_stops_the_run_before_anything_is_made(tiny_recipe: Path, tmp_path: Path) -> None:
    too_long = f"evaluate.prompts=[a, '{'river ' * 3000}']"
    with pytest.raises(SparseKDError, match=r"^evaluate\.prompts: number 2 has \d+ tokens: expected 1 to 2047"):
        report_of(tmp_path / "run", tiny_recipe, too_long)
    assert not (tmp_path / "run/corpus/blocks.parquet").exists()
