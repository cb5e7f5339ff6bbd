"""What of a recipe decides a stage: a finished run meets a changed recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekd import files, models, pipeline
from sparsekd.console import Console
from sparsekd.device import out_of_memory
from sparsekd.errors import DataError, MismatchError, ResourceError, UsageError
from sparsekd.recipe import load_recipe
from sparsekd.run.directory import Run
from sparsekd.run.stages import corpus as corpus_stage
from sparsekd.run.stages import evaluate
from sparsekd.run.work import Work

TRAINING = ("corpus", "round-01/cache", "round-01/compressed", "round-01/distilled")


def run(recipe: Path, folder: Path, *overrides: str, until: str = "report", **options: Any) -> None:
    pipeline.run(load_recipe(str(recipe), overrides), folder, until=until, **options)


def finished(folder: Path) -> dict[str, int]:
    """When each stage was finished."""
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("stage.json")}


@pytest.fixture
def done(tiny_recipe: Path, tmp_path: Path) -> Path:
    run(tiny_recipe, tmp_path / "run")
    return tmp_path / "run"


def test_what_cannot_change_a_result_leaves_all_stages_as_they_are(done: Path, tiny_recipe: Path) -> None:
    before = finished(done)
    root = load_recipe(str(tiny_recipe)).corpus.root
    run(
        tiny_recipe,
        done,
        f"corpus.root={root}/",
        "cache.batch_size=1",
        "cache.blocks_per_shard=3",
        "compress.offload=true",
        "distill.micro_batch_size=1",
        "distill.gradient_checkpointing=true",
        "distill.checkpoint_minutes=1",
        "evaluate.batch_size=1",
        "model.trust_remote_code=true",
    )
    assert finished(done) == before
    assert yaml.safe_load((done / "recipe.yaml").read_text())["cache"]["batch_size"] == 1  # the report shows this call


@pytest.mark.parametrize(
    "change", ["evaluate.context=48", "evaluate.texts.more={path: more.txt}", "evaluate.agreement=false"]
)
def test_another_evaluation_is_made_alone(change: str, done: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("A text about ships that nobody has trained on, and about the sea. " * 20)
    before = finished(done)
    run(tiny_recipe, done, change)
    after = finished(done)
    assert [stage for stage in after if after[stage] != before[stage]] == ["round-01/eval"]
    models = json.loads((done / "report.json").read_text())["evaluation"]["models"]
    assert set(models["dense"]) == {"held", "other"} | ({"more"} if "more" in change else set())


def test_a_new_text_that_was_trained_on_stops_and_changes_nothing(
    done: Path, tiny_recipe: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "leak.txt").write_text(text_file.read_text())
    about_recipe = (done / "recipe.yaml", done / "manifest.json")
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file() and path not in about_recipe}
    with pytest.raises(
        DataError, match=r"evaluation text found in training sources: .* documents of corpus\.sources\.learn"
    ):
        run(tiny_recipe, done, "evaluate.texts.leak={path: leak.txt}")
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(DataError, match=r"evaluate\.texts\.leak"):  # and again
        run(tiny_recipe, done, "evaluate.texts.leak={path: leak.txt}")


@pytest.mark.parametrize(
    ("change", "stage", "field"),
    [
        ("seed=7", "corpus", "seed is 42 there and 7 now"),
        ("corpus.seq_len=16", "corpus", "corpus.seq_len is 32 there and 16 now"),
        ("cache.top_k=4", "round-01/cache", "cache.top_k is 8 there and 4 now"),
        ("compress.reduction=0.3", "round-01/compressed", "compress.reduction is 0.15 there and 0.3 now"),
        ("distill.learning_rate=0.002", "round-01/distilled", "distill.learning_rate is 0.001 there and 0.002 now"),
    ],
)
def test_what_decides_a_stage_stops_before_anything_is_done(
    change: str, stage: str, field: str, done: Path, tiny_recipe: Path
) -> None:
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=f"{stage} holds another run: {field}"):
        run(tiny_recipe, done, change)
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_a_later_round_is_compared_before_an_early_stage_is_asked_for(done: Path, tiny_recipe: Path) -> None:
    run(tiny_recipe, done, "rounds=[0.15,0.4]")
    kept = (done / "recipe.yaml").read_text()
    with pytest.raises(
        MismatchError, match=r"round-02/compressed holds another run: compress\.reduction is 0\.4 there"
    ):
        run(tiny_recipe, done, "rounds=[0.15,0.5]", until="cache")
    assert (done / "recipe.yaml").read_text() == kept


def test_a_removed_stage_is_made_again_and_what_comes_before_it_is_kept(done: Path, tiny_recipe: Path) -> None:
    before = finished(done)
    files.remove(done / "round-01/distilled")
    run(tiny_recipe, done, "distill.learning_rate=0.002")
    after = finished(done)
    made = sorted(stage for stage in after if after[stage] != before[stage])
    assert made == ["round-01/distilled", "round-01/distilled/continuations", "round-01/eval"]


def test_a_finished_run_takes_another_round(done: Path, tiny_recipe: Path) -> None:
    before = finished(done)
    run(tiny_recipe, done, "rounds=[0.15,0.4]")
    after = finished(done)
    assert {stage for stage in before if after[stage] != before[stage]} == set()
    assert "round-02/eval" in after


def test_a_model_is_known_by_its_content_not_its_place(done: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").rename(tmp_path / "moved")
    before = finished(done)
    run(tiny_recipe, done, f"model.name={tmp_path / 'moved'}/")
    assert finished(done) == before


def test_versions_are_recorded_and_a_change_warns(done: Path, tiny_recipe: Path, capsys: Any, monkeypatch: Any) -> None:
    then = json.loads((done / "round-01/cache/inputs.json").read_text())["versions"]
    assert {"sparsekd", "torch", "transformers", "python"} <= then.keys()
    monkeypatch.setattr("sparsekd.run.stage.versions", lambda: then | {"torch": "99.0"})
    before = finished(done)
    run(tiny_recipe, done)
    assert finished(done) == before
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: round-01/cache was made with torch {then['torch']}, now 99.0" in said


def test_with_an_online_teacher_top_k_and_corpus_decide_the_training(tiny_recipe: Path, tmp_path: Path) -> None:
    run(tiny_recipe, tmp_path / "run", "distill.teacher=online")
    with pytest.raises(MismatchError, match="top_k is 8 there and 4 now"):
        run(tiny_recipe, tmp_path / "run", "distill.teacher=online", "cache.top_k=4")
    recipe = load_recipe(str(tiny_recipe), ("distill.teacher=online",))
    made_from = json.loads((tmp_path / "run/round-01/distilled/inputs.json").read_text())
    fingerprint = json.loads((tmp_path / "run/corpus/stage.json").read_text())["fingerprint"]
    assert made_from["teacher"]["corpus"] == fingerprint
    assert recipe.distill.teacher == "online"


def test_a_smaller_micro_batch_is_obeyed_when_a_training_goes_on(tiny_recipe: Path, tmp_path: Path) -> None:
    from sparsekd.distillation import worker

    sizes: list[int] = []
    original = worker.Worker.gradients

    def watched(self: Any, *given: Any) -> Any:
        sizes.append(self.micro_batch_size)
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "gradients", watched)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_recipe, tmp_path / "run", "distill.checkpoint_minutes=0")
        run(tiny_recipe, tmp_path / "run", "distill.micro_batch_size=1", until="distill")
    assert sizes[:3] == [2, 2, 2] and set(sizes[3:]) == {1} and len(sizes[3:]) == 4  # of 6 steps, two were saved


def test_the_dense_model_that_a_stage_takes_is_its_own(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    with Run.open(tmp_path / "run", recipe, Console()) as opened:
        work = Work(opened)
        read, _ = work.open(work.dense)
        taken, _ = work.take(work.dense, read.dtype)
        assert taken is not read and work.open(work.dense)[0] is not taken


def test_the_rate_search_leaves_an_online_teacher_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    from sparsekd.reproduce import reproduce

    settings = ("distill.teacher=online", "rounds=[0.3]")
    found = reproduce("III", load_recipe(str(tiny_recipe), settings), tmp_path / "run", seeds=[1], rates=[1e-3, 1e-2])
    cached = reproduce(
        "III", load_recipe(str(tiny_recipe), settings[1:]), tmp_path / "c", seeds=[1], rates=[1e-3, 1e-2]
    )
    one, other = (result["arms"]["Dense+KD"]["1"]["losses"] for result in (found, cached))
    assert one == pytest.approx(other, rel=1e-3)


def test_a_rate_that_diverges_counts_as_lost(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from sparsekd import distillation
    from sparsekd.errors import Diverged
    from sparsekd.report import experiments
    from sparsekd.reproduce import rates, reproduce

    trained = distillation.train

    def train(student: Any, data: Any, options: Any, **others: Any) -> Any:
        if options.learning_rate > 0.1:
            raise Diverged("step 3: loss nan")
        return trained(student, data, options, **others)

    monkeypatch.setattr(rates.distillation, "train", train)
    recipe = load_recipe(str(tiny_recipe), ("rounds=[0.3]",))
    found = reproduce("III", recipe, tmp_path / "run", seeds=[1], rates=[1e-3, 0.5])
    arm = found["arms"]["round 30%"]["1"]
    assert arm["learning_rate"] == 1e-3 and arm["losses"]["0.5"] is None
    assert any("0.001 (0.5: diverges)" in row for row in experiments.all_tables(found)[0].rows)
    with pytest.raises(Diverged, match="at every rate"):
        reproduce("III", recipe, tmp_path / "other", seeds=[1], rates=[0.4, 0.5])


def test_a_model_that_cannot_keep_documents_apart_is_refused_before_anything_is_made(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(model: Any) -> None:
        raise UsageError("corpus.document_mask: no")

    monkeypatch.setattr(corpus_stage, "require_document_mask", refuse)
    with pytest.raises(UsageError, match="document_mask"):
        run(tiny_recipe, tmp_path / "run", "corpus.document_mask=true")
    assert not (tmp_path / "run/corpus/blocks.parquet").exists()


def hub_model(cache: Path, folder: Path, commit: str) -> None:
    """A model as the Hub's client keeps it on disk, its main branch at `commit`."""
    snapshot = cache / "models--me--tiny/snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    refs = cache / "models--me--tiny/refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(commit)


def test_a_hub_model_is_the_commit_that_the_run_began_with(
    tiny_recipe: Path, model_folder: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    first, second = "a" * 40, "b" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_model(tmp_path / "hub", model_folder("llama"), first)
    assert models.commit_of("me/tiny") == first
    run(tiny_recipe, tmp_path / "run", "model.name=me/tiny", until="cache")
    made_from = json.loads((tmp_path / "run/corpus/inputs.json").read_text())
    assert made_from["model"] == {"name": "me/tiny", "commit": first}
    hub_model(tmp_path / "hub", model_folder("qwen3"), second)  # somebody pushes another model
    assert models.commit_of("me/tiny") == second
    run(tiny_recipe, tmp_path / "run", "model.name=me/tiny", until="compress")
    config = json.loads((tmp_path / "run/round-01/compressed/model/config.json").read_text())
    assert config["model_type"] == "sparsekd_llama"
    with pytest.raises(MismatchError, match=f"model.commit is {first} there and {second} now"):
        run(tiny_recipe, tmp_path / "run", "model.name=me/tiny", "model.revision=main", until="compress")


def test_the_structural_step_is_solved_from_float32_whatever_the_teachers_format(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        run(tiny_recipe, tmp_path / dtype, f"model.dtype={dtype}", until="compress")
    one, other = (tmp_path / dtype / "round-01/compressed/model/model.safetensors" for dtype in ("float32", "bfloat16"))
    assert one.read_bytes() == other.read_bytes()


def test_the_dense_model_reads_a_text_once_for_all(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    measured: list[tuple[str, ...]] = []
    original = evaluate.measure

    def watched(models: Any, *arguments: Any, **options: Any) -> Any:
        measured.append(tuple(models))
        return original(models, *arguments, **options)

    monkeypatch.setattr(evaluate, "measure", watched)
    run(tiny_recipe, tmp_path / "run")
    assert measured == [("dense", "compressed", "distilled")] * 2


@pytest.mark.parametrize(
    ("stage", "place"),
    [("round-01/compressed", "compression.apply"), ("round-01/distilled", "distillation.measure")],
)
def test_out_of_memory_in_any_stage_is_one_line(
    stage: str, place: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(f"sparsekd.{place}", fail)
    with pytest.raises(ResourceError, match=f"out of memory in {stage}: lower its batch_size") as caught:
        run(tiny_recipe, tmp_path / "run")
    assert caught.value.exit_code == 4


def test_out_of_memory_in_the_pictures_is_one_line(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise SystemError("error return without exception set")  # Python's own, in matplotlib's deep calls

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(ResourceError, match=r"out of memory in the report: .*call the same command again"):
        run(tiny_recipe, tmp_path / "run")
    assert not out_of_memory(SystemError("returned NULL without setting an exception"))  # a library's bug
    monkeypatch.undo()
    run(tiny_recipe, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
