"""`./x` and `x` are one model, wherever a recipe or a command names one."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsekd.errors import DataError, UsageError
from sparsekd.recipe import load_recipe
from sparsekd.recipe.names import EMBEDDED_MODEL, model_name
from sparsekd.run import planned


@pytest.fixture
def here(model_folder: Any, tmp_path: Path, monkeypatch: Any) -> Path:
    """The folder of models `llama` and `copy`, which are two with the same content, and a link to the first."""
    shutil.copytree(model_folder("llama"), tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ways(here: Path) -> list[str]:
    return ["llama", "./llama", "llama/", ".//copy/../llama", str(here / "llama"), "link", f"~/{here.name}/llama"]


def test_a_model_has_one_name_however_it_is_written(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(here.parent))
    assert {model_name(way, ["copy", "llama"]) for way in ways(here)} == {"llama"}
    assert [model_name(way) for way in ways(here)[:4]] == ["llama"] * 4
    for name in ("owner/name", "./nowhere", "nowhere/", "", "~nobody-here/x", "x" * 300, "a\0b", EMBEDDED_MODEL):
        assert model_name(name, ["llama"]) == name
    (here / "far/away").mkdir(parents=True)
    shutil.copytree("copy", "far/copy")
    (here / "there").symlink_to("far/away")
    assert model_name("there/../copy") == "there/../copy"
    os.rename("copy", EMBEDDED_MODEL)  # noqa: PTH104
    assert model_name(f"./{EMBEDDED_MODEL}", [EMBEDDED_MODEL]) == f"./{EMBEDDED_MODEL}"


def test_teachers_of_a_recipe(here: Path, tiny_recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(here.parent))
    rounds = "rounds=[0.2,0.4]"
    usual = planned(load_recipe(str(tiny_recipe), ("model.name=llama", "teacher.models={llama: 2}", rounds)))
    for way in ways(here):
        taught_by = f"teacher.models={{{way}: 0.5, llama///: 1.5}}"
        again = load_recipe(str(tiny_recipe), ("model.name=./llama", taught_by, rounds))
        assert planned(again) == usual
        assert again.model.name == "llama"
    mixed = load_recipe(str(tiny_recipe), ("model.name=llama", "teacher.models={./copy: 1, copy: 1, ./llama: 1}"))
    assert mixed.teacher.models == {"copy": 2.0, "llama": 1.0}
    assert load_recipe("./llama").model.name == "llama"


def test_eval_with_a_teacher_that_is_the_model_itself(here: Path, sparsekd: Any, text_file: Path) -> None:
    options = ("--text", text_file, "--context", "64", "--stride", "64", "--max-tokens", "128", "--json")
    usual = sparsekd("eval", "llama", "--teacher", "llama", *options)
    assert usual.code == 0, usual.err
    assert sparsekd("eval", "llama", "--teacher", "./llama", *options).json == usual.json
    assert sparsekd("eval", "./llama/", "--teacher", str(here / "llama"), *options).json == usual.json


def test_the_home_of_nobody_is_one_line(here: Path, refused: Any, text_file: Path) -> None:
    refused("run", "~nobody-here/x", "--dry-run", error=UsageError)
    refused("eval", "llama", "--text", "~nobody-here/x.txt", error=DataError)
