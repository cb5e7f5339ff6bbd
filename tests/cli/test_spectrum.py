"""`sparsekd spectrum`: a row for each matrix, and a picture."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_spectrum_prints_a_row_a_matrix_and_keeps_a_picture(
    method: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spectra"
    arguments = ["spectrum", str(tiny_recipe), "--set", f"compress.method={method}", "--reduction", "0.4"]
    outcome = sparsekd(*arguments, "--out", str(out))
    assert outcome.code == 0
    assert outcome.out.count("mlp.") == 6
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
