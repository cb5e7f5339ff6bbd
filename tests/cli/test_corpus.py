"""`sparsekd corpus`: the first that a run does, in a folder that may hold anything."""

from pathlib import Path
from typing import Any

import pytest

from sparsekd import errors


@pytest.mark.parametrize("options", [(), ("--fresh",), ("--resume",)])
@pytest.mark.parametrize("manifest", ['{"name": "an application"}', '{"format": 1}', "[]", "{", ""])
def test_a_folder_that_is_no_run_keeps_its_files(
    manifest: str, options: tuple[str, ...], refused: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Many programs call a file manifest.json; `--fresh` removes a run, and nothing else."""
    out = tmp_path / "out"
    (out / "corpus").mkdir(parents=True)
    (out / "corpus" / "thesis.txt").write_text("years of work")
    (out / "manifest.json").write_text(manifest)
    (out / "recipe.yaml").write_text("soup: {salt: 1}")
    (out / "report.html").write_text("mine")
    refused("corpus", tiny_recipe, "--out", out, *options, error=errors.UsageError)


@pytest.mark.parametrize(
    "left", [(), ("manifest.json.tmp-1",), ("manifest.json",), ("manifest.json", "recipe.yaml.tmp-1")]
)
def test_a_run_killed_in_its_first_moment_goes_on(
    left: tuple[str, ...], sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("run.lock", *left):
        (out / name).write_text('{"kind": "sparsekd run"}' if name == "manifest.json" else "")
    outcome = sparsekd("corpus", tiny_recipe, "--out", out)
    assert outcome.code == 0, outcome.err


def test_a_changed_corpus_file_leaves_the_run_as_it_was(
    sparsekd: Any, refused: Any, tiny_recipe: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    assert sparsekd("corpus", tiny_recipe, "--out", out).code == 0
    text_file.write_text(text_file.read_text() + "\n\nOne more paragraph.")
    line = refused("run", tiny_recipe, "--out", out, error=errors.MismatchError)
    assert "holds another run: files.learn is" in line


def test_a_recipe_beside_a_stale_lock_is_not_ours(refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.lock").write_text("process 1")
    (out / "recipe.yaml").write_text("mine")
    refused("corpus", tiny_recipe, "--out", out, error=errors.UsageError)
