"""A finished run whose files are damaged, missing, edited or another run's: always one line, never in silence."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd import distillation, files, models, pipeline, records, report
from sparsekd.errors import DataError
from sparsekd.recipe import load_recipe
from sparsekd.run import inspection

TASKS = "evaluate.tasks=[local_piqa]"
SKIPPED = "evaluate.skip_missing_tasks=true"  # a score is that there is none
_made: dict[str, Path] = {}  # the run that every test damages a copy of, and its recipe


def run(recipe: Path, folder: Path, *overrides: str) -> None:
    pipeline.run(load_recipe(str(recipe), (TASKS, SKIPPED, *overrides)), folder)


@pytest.fixture
def done(tiny_recipe: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A finished run of one's own, and its recipe."""
    if not _made:
        run(tiny_recipe, tmp_path / "run")
        run(tiny_recipe, tmp_path / "other", "seed=7")
        _made.update(run=tmp_path / "run", other=tmp_path / "other", recipe=tiny_recipe)
    return Path(shutil.copytree(_made["run"], tmp_path / "copy")), _made["recipe"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """The file of that name in a run with another seed."""
    copy = next(folder for folder in path.parents if folder.name == "copy")
    shutil.copyfile(_made["other"] / path.relative_to(copy), path)


WEIGHTS = ["round-01/compressed/model/model.safetensors", "round-01/distilled/model/model.safetensors"]
PROTECTED = [*WEIGHTS, "round-01/eval/distilled-text-held.json", "round-01/distilled/model/sparsekd.json"]


@pytest.mark.parametrize("name", PROTECTED)
@pytest.mark.parametrize("harm", [flip, swap, Path.unlink])
def test_a_damaged_file_of_a_stage_stops_the_run_and_the_report(
    name: str, harm: Callable[[Path], None], sparsekd: Any, done: tuple[Path, Path]
) -> None:
    folder, recipe = done
    path = folder / name
    stage = folder.joinpath(*Path(name).parts[:2])
    harm(path)
    for arguments in (
        ("run", recipe, "--resume", "--out", folder, "--set", TASKS, "--set", SKIPPED),
        ("report", folder),
        ("inspect", "--verify", folder),
    ):
        outcome = sparsekd(*arguments)
        assert outcome.code == DataError.exit_code
        assert "open it with" not in outcome.out
        line = outcome.err.splitlines()[-1]
        assert line.endswith(f"; remove {stage} to make the stage again")
        assert f"{path} is " in line
    states = inspection.describe(folder)
    key = {"compressed": "compress", "distilled": "distill", "eval": "evaluate"}[stage.name]
    assert [name for name, state in states.items() if str(state).startswith("damaged: ")] == [key]


def test_removing_what_the_message_names_is_the_way_out(done: tuple[Path, Path]) -> None:
    folder, recipe = done
    before = (folder / WEIGHTS[1]).read_bytes()
    flip(folder / WEIGHTS[1])
    shutil.rmtree(folder / "round-01/distilled")
    run(recipe, folder)
    assert (folder / WEIGHTS[1]).read_bytes() == before
    assert inspection.verify(folder)["damaged stages"] == {}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_model_is_not_loaded(name: str, done: tuple[Path, Path]) -> None:
    path = done[0] / name
    flip(path)
    with pytest.raises(DataError, match=r"model\.safetensors is damaged: .*remove .*/model/sparsekd\.json") as caught:
        models.load(str(path.parent))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        inspection.verify(path.parent)
    (path.parent / "sparsekd.json").unlink()
    assert models.load(str(path.parent))


def records_of(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("stage.json", "inputs.json", "manifest.json", "guarded.json"):
            yield path


def test_a_changed_figure_in_any_record_is_one_line(sparsekd: Any, done: tuple[Path, Path]) -> None:
    """Every number of every record is read for what it is, or refused: none is a KeyError or a template's error."""
    folder, recipe = done
    arguments = ("run", recipe, "--out", folder, "--set", TASKS, "--set", SKIPPED)
    paths = list(records_of(folder))
    assert len(paths) >= 15
    for path in paths:
        whole = path.read_bytes()
        content = json.loads(whole)
        second = list(content)[1]  # the first key of a run's manifest says that it is one
        for changed in ({key: content[key] for key in content if key != second}, content | {second: "another"}):
            path.write_text(json.dumps(changed, indent=1) + "\n")
            outcome = sparsekd(*arguments)
            assert outcome.code == DataError.exit_code, (path, outcome.err)
            line = outcome.err.splitlines()[-1]
            assert line.startswith(f"sparsekd: {path} is damaged: its content is not what was written; ")
        path.write_bytes(whole)


def test_stages_in_each_other_s_place_are_noticed(done: tuple[Path, Path]) -> None:
    folder, recipe = done
    one, two = folder / "round-01/compressed/stage.json", folder / "round-01/distilled/stage.json"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(DataError, match=r"compressed/inputs\.json is damaged"):
        run(recipe, folder)


@pytest.mark.parametrize("harm", [flip, swap, Path.unlink])
def test_a_result_of_an_unfinished_evaluation_is_measured_again(
    harm: Callable[[Path], None], done: tuple[Path, Path], capsys: Any
) -> None:
    folder, recipe = done
    path = folder / "round-01/eval/distilled-text-held.json"
    before = path.read_bytes()
    harm(path)
    (folder / "round-01/eval/stage.json").unlink()
    run(recipe, folder)
    assert path.read_bytes() == before
    said = " ".join(capsys.readouterr().err.split())
    assert ("it is made again" in said) == (harm is not Path.unlink)


def test_an_edited_recipe_is_not_reported(done: tuple[Path, Path]) -> None:
    folder, recipe = done
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("context: 64", "context: 65"))
    with pytest.raises(DataError, match=r"recipe\.yaml is damaged: .*run the same command again"):
        report.write(folder)
    run(recipe, folder)
    assert report.write(folder)["recipe"]["evaluate"]["context"] == 64


def test_another_run_s_manifest_is_named(done: tuple[Path, Path]) -> None:
    folder, recipe = done
    swap(folder / "manifest.json")
    for look in (inspection.describe, inspection.verify, report.write):
        with pytest.raises(
            DataError, match=rf"recipe\.yaml is damaged: .*or {folder}/manifest\.json is another run's; "
        ):
            look(folder)
    run(recipe, folder)
    assert inspection.verify(folder)["damaged stages"] == {}


def test_a_recipe_that_is_no_text_any_more_is_named_and_written_again(done: tuple[Path, Path]) -> None:
    folder, recipe = done
    path = folder / "recipe.yaml"
    content = path.read_bytes()
    path.write_bytes(content[:50] + b"\xa0" + content[51:])
    for look in (inspection.describe, inspection.verify, report.write):
        with pytest.raises(DataError, match=r"recipe\.yaml is damaged"):
            look(folder)
    run(recipe, folder)
    assert path.read_bytes() == content


def test_another_record_in_the_manifest_s_place_is_named(done: tuple[Path, Path]) -> None:
    folder, _ = done
    shutil.copyfile(folder / "round-01/distilled/inputs.json", folder / "manifest.json")
    says = rf"^{folder}/manifest\.json is damaged: it is not what a run writes there; "
    for look in (inspection.describe, inspection.verify, report.write):
        with pytest.raises(DataError, match=says):
            look(folder)


def test_another_record_in_the_place_of_stage_json_is_named(done: tuple[Path, Path], sparsekd: Any) -> None:
    folder, _ = done
    path = folder / "round-01/eval/stage.json"
    shutil.copyfile(folder / "round-01/eval/dense-text-other.json", path)
    says = f"{path} is damaged: seconds is missing; remove {path.parent} to make the stage again"
    outcome = sparsekd("inspect", "--verify", folder)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (3, f"sparsekd: {folder}: 1 damaged stages: {says}")


STAGES = ["corpus", "round-01/cache", "round-01/compressed", "round-01/distilled", "round-01/eval"]
OF_A_MODEL = ["dense/tasks", "round-01/distilled/continuations"]


@pytest.mark.parametrize("stage", STAGES + OF_A_MODEL)
def test_a_lost_stage_json_is_not_taken_for_a_stage_that_was_only_begun(
    stage: str, sparsekd: Any, done: tuple[Path, Path]
) -> None:
    folder, recipe = done
    path = folder / stage / "stage.json"
    path.unlink()
    says = f"{path} is missing: run the same command again, which makes it, and the stage with it"
    states = inspection.describe(folder).values()
    assert (f"damaged: {says}" in states) == (stage in STAGES)
    outcome = sparsekd("inspect", "--verify", folder)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (3, f"sparsekd: {folder}: 1 damaged stages: {says}")
    with pytest.raises(DataError, match=f"^{path} is missing, so stage .* is not finished: continue it with"):
        report.write(folder)
    run(recipe, folder)
    assert inspection.verify(folder)["damaged stages"] == {}


def test_a_stage_that_is_made_again_and_was_killed_is_no_damage(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = done
    shutil.rmtree(folder / "round-01/compressed")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("sparsekd.run.work.Work.save", dies)
        run(recipe, folder)
    assert inspection.describe(folder)["compress"] == "started, not finished"
    assert inspection.verify(folder)["damaged stages"] == {}


def test_what_the_leak_guard_has_seen_is_part_of_the_corpus(done: tuple[Path, Path]) -> None:
    corpus = done[0] / "corpus"
    (corpus / "guarded.json").unlink()
    wrong = f"{corpus}/guarded.json does not exist; remove {corpus} to make the stage again"
    assert inspection.verify(done[0])["damaged stages"] == {"corpus": wrong}
    assert inspection.describe(done[0])["corpus"] == f"damaged: {wrong}"


@pytest.mark.parametrize("stage", STAGES)
def test_output_of_which_nobody_knows_what_it_is_from_is_not_gone_on_with(
    stage: str, sparsekd: Any, done: tuple[Path, Path]
) -> None:
    folder, recipe = done
    for name in ("inputs.json", "stage.json"):
        (folder / stage / name).unlink()
    left = list((folder / stage).iterdir())
    outcome = sparsekd("run", recipe, "--resume", "--out", folder, "--set", TASKS, "--set", SKIPPED)
    missing = f"{folder}/{stage}/inputs.json is missing; remove {folder}/{stage} to make the stage again"
    assert (outcome.code, outcome.err.splitlines()[-1]) == (3, f"sparsekd: {missing}")
    assert list((folder / stage).iterdir()) == left


def stopped_training(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage's folder, with two checkpoints and their best weights."""

    def dies(step: Any, num_steps: int) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    train = distillation.train
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(distillation, "train", lambda *given, **options: train(*given, **options | {"on_step": dies}))
        run(recipe, folder, "distill.checkpoint_minutes=0")
    return folder / "round-01/distilled"


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_damage_to_a_stopped_training_is_named(
    harm: Callable[[Path], None], sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "run"
    stage = stopped_training(tiny_recipe, folder, monkeypatch)
    assert inspection.describe(folder)["distill"] == "started, not finished"
    assert inspection.verify(folder)["damaged stages"] == {}
    needed = [path for path in sorted(stage.rglob("*")) if path.is_file() and path.name != distillation.METRICS]
    assert len(needed) >= 1 + 2 * 3 + 2
    for path in needed:
        content = path.read_bytes()
        harm(path)
        outcome = sparsekd("inspect", "--verify", folder)
        message = outcome.err.splitlines()[-1]
        assert (outcome.code, str(path) in message) == (DataError.exit_code, True), message
        path.write_bytes(content)
    (stage / "inputs.json").unlink()
    missing = f"{stage}/inputs.json is missing; remove {stage} to make the stage again"
    assert inspection.describe(folder)["distill"] == f"damaged: {missing}"
    with pytest.raises(DataError, match=missing):
        run(tiny_recipe, folder)


def test_a_run_of_an_earlier_version_is_kept_with_a_warning(done: tuple[Path, Path], capsys: Any) -> None:
    """It has no hashes: one line a stage says that nothing is checked."""
    folder, recipe = done
    for path in records_of(folder):
        content = records.read(path)
        if path.name == "stage.json":
            del content["files"]
        files.write_json(path, content)
    for path in folder.rglob("sparsekd.json"):
        path.unlink()
    expected = files.read_json(folder / "report.json")
    capsys.readouterr()
    run(recipe, folder)
    said = capsys.readouterr().err
    for stage in ("corpus", "round-01/cache", "round-01/compressed", "round-01/distilled", "round-01/eval"):
        assert f"warning: {folder / stage} was finished by an earlier version" in " ".join(said.split())
    assert files.read_json(folder / "report.json") == expected
    assert inspection.describe(folder)["distill"].startswith("finished, not checked")
    path = folder / "round-01/distilled/stage.json"
    content = files.read_json(path)
    del content["seconds"]
    files.write_json(path, content)
    with pytest.raises(DataError, match=r"distilled/stage\.json is damaged: seconds is missing; remove "):
        report.write(folder)


def test_a_run_with_an_online_teacher_can_be_verified(tiny_recipe: Path, tmp_path: Path) -> None:
    run(tiny_recipe, tmp_path / "online", "distill.teacher=online")
    facts = inspection.verify(tmp_path / "online")
    assert (facts["kind"], facts["damaged stages"]) == ("run", {})


def test_each_file_is_hashed_once(done: tuple[Path, Path], monkeypatch: Any) -> None:
    folder, recipe = done
    read: list[str] = []
    digest = files.hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    run(recipe, folder)
    weights = [name for name in read if name.startswith(str(folder)) and name.endswith("model.safetensors")]
    assert sorted(weights) == sorted(str(folder / name) for name in WEIGHTS)


def test_hostile_listings_name_no_other_place(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a")
    record = tmp_path / "model" / "sparsekd.json"
    for name in ("../secret", str(tmp_path / "secret")):
        facts = {"bytes": 1, "sha256": files.file_sha256(tmp_path / "secret")}
        with pytest.raises(DataError, match=r"sparsekd\.json is damaged: expected files"):
            records.require(record, {name: facts}, "")


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, 1e-300, 0.1 + 0.2, None, True], "b": {3: "\u00e9"}, "c": float(torch.tensor(0.1))}
    records.write(tmp_path / "a.json", content)
    assert records.read(tmp_path / "a.json") == content | {"b": {"3": "\u00e9"}}
