"""What cannot be exported: one clear line each, and no folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekd as package
from sparsekd import errors, export
from sparsekd.errors import QualityError, ResourceError, UsageError


def test_options_that_cannot_be(refused: Any, model_folder: Any, tmp_path: Path) -> None:
    model, out = model_folder("llama"), tmp_path / "out"
    line = refused("export", model, "--format", "tflite", "--out", out, error=errors.UsageError)
    assert "--format tflite: expected one of dense" in line and "hf" in line
    line = refused("export", model, "--weights", "int3", "--out", out, error=errors.UsageError)
    assert "--weights int3: format hf has float32, bfloat16, float16" in line
    line = refused("export", tmp_path / "nowhere", "--out", out, error=errors.UsageError)
    assert "no such folder" in line
    line = refused("export", model, "--out", model, error=errors.UsageError)
    assert f"{model} is there already: choose another --out" in line
    assert not out.exists()


def test_a_run_that_is_not_finished(refused: Any, sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert sparsekd("corpus", tiny_recipe, "--out", out).code == 0
    line = refused("export", out, error=errors.DataError)
    assert f"{out} has no finished model yet: continue it with sparsekd run" in line
    assert not (out / "export").exists()


def test_a_damaged_model(refused: Any, small_model: Any, tmp_path: Path) -> None:
    folder, _ = small_model
    (folder / "generation_config.json").unlink()
    assert "generation_config.json is missing" in refused("export", folder, error=errors.DataError)


def test_a_disk_that_is_too_small(make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="the exported model needs about"):
        export.export(make("llama", "dense"), tokenizer, "hf", tmp_path / "o", export.Source("x"), weights="float32")
    assert not list(tmp_path.iterdir())


def test_an_export_that_says_something_else_is_not_kept(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make("llama", "dense")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6  # more than a float16 can be
    with pytest.raises(QualityError, match=r"format hf \(float16\) does not say what the model does: logits differ"):
        export.export(model, tokenizer, "hf", tmp_path / "out", export.Source("x"), weights="float16")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_plain_transformers_cannot_open(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make("llama", "lowrank")
    export.format_named("hf").write(model, tokenizer, tmp_path, "float32", export.Source("x"))
    (tmp_path / "modeling_sparsekd.py").write_text("import sparsekd\n")
    with pytest.raises(QualityError, match=r"plain transformers cannot open the folder: .*sparsekd"):
        export.format_named("hf").open(tmp_path)(torch.zeros(1, 4, dtype=torch.long))


def test_a_class_that_transformers_does_not_have(make: Any) -> None:
    model: Any = make("llama", "lowrank")
    base = type(model).__bases__[1]
    other = type("OtherForCausalLM", (base,), {"config_class": base.config_class})
    model.__class__ = package.models.forms.rebuilt_class(other)
    with pytest.raises(UsageError, match="OtherForCausalLM is not a class of transformers itself: export such a"):
        export.format_named("hf").require(model)
