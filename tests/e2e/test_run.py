"""The whole path on tiny real models: run, reuse, resume, report, load."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparsekd import SparseKDError, models, perplexity, pipeline
from sparsekd.recipe import load_recipe


def recipe_for(tiny_recipe: Path, folder: Path) -> Path:
    values = yaml.safe_load(tiny_recipe.read_text())
    values["model"] = {"name": str(folder)}
    path = tiny_recipe.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2"])
def test_every_architecture_goes_the_whole_path(
    architecture: str, sparsekd: Any, tiny_recipe: Path, model_folder: Any, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny_recipe, model_folder(architecture))
    out = tmp_path / "run"
    settings = ["--set", "compress.method=two-sided", "--set", "compress.allocation=global"]
    outcome = sparsekd("run", recipe, "--out", out, "--json", "--reduction", "0.3", *settings)
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report == json.loads((out / "report.json").read_text())
    assert report["compression"]["mlp_reduction"] >= 0.3
    assert set(report["evaluation"]["models"]) == {"dense", "compressed", "distilled"}
    assert len(report["evaluation"]["models"]["dense"]) == 2
    folder = out / report["model_folder"]
    assert not list(folder.glob("*.bin"))
    model, tokenizer = models.load(str(folder))
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    text = (out / "corpus" / "text-held.txt").read_text() if (out / "corpus" / "text-held.txt").exists() else None
    name = next(iter(report["evaluation"]["models"]["distilled"]))
    text = text or (out / "corpus" / f"text-{name}.txt").read_text()
    again = perplexity(model, tokenizer, text, context=64, stride=32)
    assert again.perplexity > 1
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    copy, _ = models.load(str(tmp_path / "copy"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="sparsekd_"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_second_call_reuses_everything(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    first = pipeline.run(recipe, tmp_path / "run")
    model = (tmp_path / "run/round-01/distilled/model/model.safetensors").stat().st_mtime_ns
    assert pipeline.run(recipe, tmp_path / "run") == first
    assert (tmp_path / "run/round-01/distilled/model/model.safetensors").stat().st_mtime_ns == model


def report_of(recipe: Any, folder: Path) -> Any:
    pipeline.run(recipe, folder)
    return json.loads((folder / "report.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "round-01/distilled/model/model.safetensors").read_bytes()


def test_stage_by_stage_is_the_same_as_one_run(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    pipeline.run(recipe, tmp_path / "one")
    for stage in pipeline.UNTIL:
        pipeline.run(recipe, tmp_path / "steps", until=stage)
    assert weights(tmp_path / "one") == weights(tmp_path / "steps")


def test_same_recipe_twice_gives_the_same_bytes_and_another_seed_does_not(tiny_recipe: Path, tmp_path: Path) -> None:
    for name, overrides in (("a", ()), ("b", ()), ("c", ("seed=7",))):
        pipeline.run(load_recipe(str(tiny_recipe), overrides), tmp_path / name, until="distill")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize(
    ("when", "how"), [("caching", signal.SIGKILL), ("training", signal.SIGTERM), ("training", signal.SIGKILL)]
)
def test_killed_and_run_again_gives_the_same_bytes(when: str, how: int, tiny_recipe: Path, tmp_path: Path) -> None:
    """A real process, a real signal, with a checkpoint after every step."""
    changes = ("cache.blocks_per_shard=1", "distill.epochs=12", "distill.checkpoint_minutes=0")
    recipe = load_recipe(str(tiny_recipe), changes)
    pipeline.run(load_recipe(str(tiny_recipe), changes[:2]), tmp_path / "straight", until="distill")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "sparsekd", "distill", str(tiny_recipe), "--out", str(out)]
    command += [word for change in changes for word in ("--set", change)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    trained = out / "round-01/distilled"
    watched = out / "round-01/cache/part-00003.parquet" if when == "caching" else trained / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if watched.exists() and (when == "caching" or '"step": 3,' in watched.read_text()):
            break
        time.sleep(0.01)
    os.kill(process.pid, how)
    _, error = process.communicate(timeout=120)
    assert process.returncode == (143 if how == signal.SIGTERM else -how), error
    if how == signal.SIGTERM:
        assert "state saved" in error
    if when == "training":
        assert list((trained / "checkpoints").glob("step-*/state.json"))
    pipeline.run(recipe, out, until="distill")
    assert weights(out) == weights(tmp_path / "straight")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if line["kind"] == "step") == list(range(1, 73))
    assert not (trained / "checkpoints").exists()


def test_an_online_teacher_needs_no_cache(tiny_recipe: Path, tmp_path: Path) -> None:
    cached = load_recipe(str(tiny_recipe))
    online = load_recipe(str(tiny_recipe), ("distill.teacher=online",))
    reports = [report_of(recipe, tmp_path / name) for name, recipe in (("a", cached), ("b", online))]
    assert not list((tmp_path / "b/round-01/cache").glob("*.parquet"))
    assert "nothing was cached" in (tmp_path / "b/report.html").read_text()
    for a, b in zip(*(report["distillation"]["steps"] for report in reports), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)  # the cache is rounded to fp16


def test_training_knows_the_dense_model_and_the_domains(tiny_recipe: Path, tmp_path: Path) -> None:
    report = report_of(load_recipe(str(tiny_recipe)), tmp_path / "run")
    history = report["distillation"]
    assert 5 < history["dense_ce"] < 7  # a random model of 400 tokens: about log 400
    assert history["stop_reason"] == "all 1 epochs are done"
    assert set(history["validations"][0]["domains"]) == {"learn"}


def test_masked_documents_go_the_whole_path(tiny_recipe: Path, tmp_path: Path) -> None:
    several = "corpus.seq_len=256"  # tokens of several documents
    plain = load_recipe(str(tiny_recipe), (several,))
    masked = load_recipe(str(tiny_recipe), (several, "corpus.document_mask=true"))
    reports = [report_of(recipe, tmp_path / name) for name, recipe in (("a", plain), ("b", masked))]
    assert reports[0]["corpus"]["fingerprint"] != reports[1]["corpus"]["fingerprint"]
    assert reports[0]["distillation"]["dense_ce"] != reports[1]["distillation"]["dense_ce"]
    assert report_of(masked, tmp_path / "b") == reports[1]  # read back from disk, separator and all


def test_two_processes_cannot_share_a_run(tiny_recipe: Path, tmp_path: Path) -> None:
    from sparsekd.console import Console
    from sparsekd.run.directory import Run

    recipe = load_recipe(str(tiny_recipe))
    with (
        Run.open(tmp_path / "run", recipe, Console()),
        pytest.raises(SparseKDError, match="in use by process"),
        Run.open(tmp_path / "run", recipe, Console()),
    ):
        pass


def test_fresh_starts_again_and_keeps_other_files(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pipeline.run(load_recipe(str(tiny_recipe)), out, until="corpus")
    (out / "notes.txt").write_text("mine")
    other = load_recipe(str(tiny_recipe), ("seed=7",))
    with pytest.raises(SparseKDError, match="seed is 42 there and 7 now"):
        pipeline.run(other, out, until="corpus")
    pipeline.run(other, out, until="corpus", fresh=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_changed_source_file_is_noticed(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe))
    pipeline.run(recipe, tmp_path / "run", until="corpus")
    source = next(s.path for s in recipe.corpus.sources.values() if s.path)
    path = Path(recipe.corpus.root or ".") / source
    path.write_text(path.read_text() + "\n\nOne more paragraph that was not there before.\n")
    with pytest.raises(SparseKDError, match=r"holds another run: files\."):
        pipeline.run(recipe, tmp_path / "run", until="corpus")


def test_the_report_is_self_contained_and_escapes(tiny_recipe: Path, tmp_path: Path) -> None:
    from sparsekd import report

    pipeline.run(load_recipe(str(tiny_recipe)), tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    outside = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert "http" not in outside
    assert "<script" not in page
    gathered = report.gather(tmp_path / "run")
    gathered["recipe"]["model"]["name"] = "<script>alert(1)</script>"
    gathered["compression"]["matrices"][0] |= {"rank": None, "relative_error": 0.0}  # left dense
    assert "<script" not in report.html.render(gathered)


def test_quickstart_runs(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "quickstart.py"
    arguments = [str(model_folder("llama")), str(text_file), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["dense", "compressed", "distilled"]
