"""`sparsekd eval`: any model, on texts and tasks, with or without a teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sparsekd import errors, models
from sparsekd.recipe import PROMPTS


def test_eval_of_a_dense_and_a_compressed_model(
    sparsekd: Any, small_model: Any, model_folder: Any, text_file: Path
) -> None:
    options = ("--text", text_file, "--context", "64", "--stride", "32", "--max-tokens", "300")
    results = {}
    for folder in (small_model[0], model_folder("llama")):
        outcome = sparsekd("eval", folder, *options, "--json")
        assert outcome.code == 0, outcome.err
        assert list(outcome.json["models"]) == [str(folder)]
        results[folder.name] = outcome.json["models"][str(folder)][text_file.name]["perplexity"]
        assert results[folder.name] > 1
        assert f"{results[folder.name]:.2f}" in sparsekd("eval", folder, *options).out.replace(",", "")
    assert results["small"] != results["llama"]


def test_eval_of_two_texts(sparsekd: Any, model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    """Two texts with the same file name are two texts."""
    other = tmp_path / "elsewhere" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text()[::-1])
    options = ("--context", "64", "--stride", "64", "--max-tokens", "200", "--json")
    outcome = sparsekd("eval", model_folder("llama"), "--text", text_file, "--text", other, *options)
    assert outcome.code == 0, outcome.err
    (found,) = outcome.json["models"].values()
    assert list(found) == [str(text_file), str(other)]
    assert len({result["perplexity"] for result in found.values()}) == 2


def test_eval_against_a_teacher_and_on_a_task(
    sparsekd: Any, small_model: Any, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    rows = "\n".join(json.dumps({"goal": f"To {i}", "sol1": "river", "sol2": "a garden", "label": 0}) for i in range(5))
    (tmp_path / "tasks" / "piqa_val.jsonl").write_text(rows)
    small, dense = str(small_model[0]), str(model_folder("llama"))
    options = ["--text", text_file, "--teacher", dense, "--context", "64", "--stride", "32", "--max-tokens", "300"]
    options += ["--tasks", "local_piqa", "--root", tmp_path, "--limit", "4"]
    found = sparsekd("eval", small, *options, "--json").json
    assert found["models"][small][text_file.name]["agreement"]["kl"]["value"] > 0
    assert found["models"][dense][text_file.name]["agreement"] is None
    assert found["tasks"][small]["local_piqa"]["num_rows"] == 4
    assert [one["prompt"] for one in found["continuations"][small]] == list(PROMPTS)
    assert list(found["continuations"]) == [dense, small]
    assert {one["parts_at"] for one in found["continuations"][dense]} == {None}
    assert {one["parts_at"] for one in found["continuations"][small]} != {None}
    printed = sparsekd("eval", small, *options).out
    for title in ("Perplexity", "Calibration", "Agreement with the teacher", "What the models say", "Tasks"):
        assert title in printed
    only_task = sparsekd("eval", small, "--tasks", "local_piqa", "--root", tmp_path)
    assert only_task.code == 0
    assert "acc_norm" in only_task.out and "Perplexity" not in only_task.out


def test_eval_says_where_and_how_model_and_teacher_run(
    sparsekd: Any, refused: Any, model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model = model_folder("llama")
    teacher = shutil.copytree(model, tmp_path / "teacher")
    given: list[dict[str, Any]] = []
    original = models.load

    def load(name: str, **options: Any) -> Any:
        given.append(options)
        return original(name, **options)

    monkeypatch.setattr(models, "load", load)
    texts = ("--text", text_file, "--context", "64", "--stride", "64", "--max-tokens", "200")
    options = ("--teacher", teacher, "--device", "cpu", "--dtype", "bfloat16", "--trust-remote-code")
    outcome = sparsekd("eval", model, *texts, *options, "--json")
    assert outcome.code == 0, outcome.err
    for one in given:
        assert one["device"] == torch.device("cpu")
        assert one["dtype"] == torch.bfloat16
        assert one["trust_remote_code"]
    assert len(given) == 2
    plain = sparsekd("eval", model, *texts, "--json").json
    assert outcome.json["models"][str(model)] != plain["models"][str(model)]
    assert given[2]["trust_remote_code"] is False
    line = refused("eval", model, *texts, "--device", "gpu", error=errors.UsageError)
    assert "device 'gpu' cannot be used here" in line
    line = refused("eval", model, *texts, "--dtype", "int8", error=errors.UsageError)
    assert "expected auto, float32, bfloat16 or float16" in line


def test_eval_on_nothing_or_of_another_tokenizer_is_refused(
    refused: Any, model_folder: Any, make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    model = model_folder("llama")
    assert "nothing to evaluate on" in refused("eval", model, error=errors.UsageError)
    line = refused("eval", model, "--tasks", "local_piqa", "--teacher", model, error=errors.UsageError)
    assert "--teacher compares on texts" in line
    line = refused("eval", model, "--tasks", "local_piqa", "--root", tmp_path, error=errors.DataError)
    assert "piqa_val.jsonl: no such file" in line
    line = refused("eval", model, "--tasks", "local_pica", error=errors.UsageError)
    assert "known are local_arc_easy" in line
    other = tmp_path / "other"
    shutil.copytree(model, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    line = refused("eval", model, "--text", text_file, "--teacher", other, error=errors.DataError)
    assert "its tokenizer is not that of" in line


def test_eval_names_a_number_that_is_not_finite(sparsekd: Any, model_folder: Any, text_file: Path) -> None:
    """A perplexity is capped, but its standard error beside it overflows, and JSON has no word for that."""
    folder = model_folder("llama")
    model, _ = models.load(str(folder))
    model.get_input_embeddings().weight.data.mul_(1e3)
    model.model.norm.weight.data.mul_(1e7)
    model.save_pretrained(folder)
    options = ("--context", 32, "--stride", 16, "--max-tokens", 128, "--json")
    outcome = sparsekd("eval", folder, "--text", text_file, *options)
    assert outcome.code == errors.DataError.exit_code, outcome
    assert outcome.out == ""
    assert "llama.learn.txt.standard_error is not finite (inf)" in outcome.err.splitlines()[-1]


def test_eval_of_a_text_that_is_missing_or_empty(refused: Any, model_folder: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    line = refused("eval", model_folder("llama"), "--text", missing, "--json", error=errors.DataError)
    assert f"{missing}: no such file" in line
    missing.write_text("")
    refused("eval", tmp_path / "llama", "--text", missing, "--json", error=errors.DataError)
