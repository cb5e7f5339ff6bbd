"""`sparsekd spectrum`: a row for each matrix, or for each MLP, and a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekd.errors import UsageError
from sparsekd.report import tables


@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_spectrum_prints_a_row_a_matrix_and_keeps_a_picture(
    method: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spectra"
    arguments = ["spectrum", str(tiny_recipe), "--set", f"compress.method={method}", "--reduction", "0.4"]
    outcome = sparsekd(*arguments, "--out", str(out))
    assert outcome.code == 0
    assert outcome.out.count("mlp.") == 6
    assert f"Spectra by {method}; a uniform cut of 40%" in outcome.out and "of the weight" in outcome.out
    found = json.loads((out / "spectrum.json").read_text())
    assert found["reduction"] == 0.4
    for matrix in found["matrices"]:
        assert len(matrix["singular_values"]) == 32
        assert 1 <= matrix["effective_rank"] <= 32
        assert sum(matrix["energy"]) == pytest.approx(1)
        assert (matrix["predicted_kl"] is None) == (method == "svd")
        lost = sum(matrix["energy"][matrix["rank"] :])
        assert matrix["relative_error"] == pytest.approx(lost, abs=1e-9)
    assert (out / "spectrum.svg").read_text().startswith("<svg")


def test_of_neurons_it_shows_what_each_width_costs(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "spectra"
    settings = ("--set", "compress.method=neurons", "--set", "compress.neurons.multiple=4", "--reduction", "0.4")
    printed = sparsekd("spectrum", tiny_recipe, *settings, "--out", out)
    assert printed.code == 0, printed
    assert printed.out.count("mlp.down_proj") == 2 and "predicted KL of all" in printed.out
    assert "of keeping a share of the neurons; widths for 40% removed" in printed.out
    found = json.loads((out / "spectrum.json").read_text())
    assert found == sparsekd("spectrum", tiny_recipe, *settings, "--json").json
    assert (found["method"], found["reduction"], found["num_tokens"]) == ("neurons", 0.4, 256)
    for mlp in found["mlps"]:
        assert mlp["kept"] == list(range(0, 65, 4)) and len(mlp["predicted_kl"]) == 17
        assert mlp["neurons_by_allocation"]["uniform"] == 36
    for allocation, kl in found["predicted_kl_by_allocation"].items():
        assert kl == pytest.approx(sum(mlp["predicted_kl_by_allocation"][allocation] for mlp in found["mlps"]))
        assert f"{kl:.3g}" in printed.out
    picture = (out / "spectrum.svg").read_text()
    assert picture.startswith("<svg") and "<image" not in picture and "nan" not in picture
    assert "<!-- neurons kept -->" in picture and "<!-- KL predicted (nats a token) -->" in picture


def test_the_table_of_neurons_reads_the_curves() -> None:
    mlp = {
        "name": "mlp.down",
        "neurons": 1000,
        "kept": [0, 500, 1000],
        "predicted_kl": [3.0, 1.0, 0.0],
        "neurons_by_allocation": {"global": 500, "uniform": 640},
    }
    found = {"reduction": 0.5, "mlps": [mlp], "predicted_kl_by_allocation": {"global": 1.0, "uniform": 0.72}}
    _, header, rows, _ = tables.damage(found)
    assert header == ["reads the neurons", "neurons", "95%", "85%", "65%", "50%", "35%", "20%", "global", "uniform"]
    assert rows[0] == ["mlp.down", "1,000", "0.1", "0.3", "0.7", "1", "1.6", "2.2", "500", "640"]
    assert rows[1] == ["predicted KL of all", *[""] * 7, "1", "0.72"]


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_zeros_have_neither(method: str, refused: Any, tiny_recipe: Path) -> None:
    line = refused("spectrum", tiny_recipe, "--set", f"compress.method={method}", error=UsageError)
    assert f"compress.method is {method}, which has no directions" in line
