"""`sparsekd compress`: the model is as small as was planned."""

from pathlib import Path
from typing import Any

from sparsekd import models


def test_dry_run_tells_what_the_run_then_does(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    planned = sparsekd("run", tiny_recipe, "--dry-run", "--json", "--reduction", "0.3").json
    made = sparsekd("compress", tiny_recipe, "--json", "--reduction", "0.3", "--out", tmp_path / "run").json
    for name in ("model_parameters_before", "model_parameters_after", "mlp_reduction"):
        assert made["compress"][name] == planned["compression"][name]
    assert made["cache"]["bytes"] < 2 * planned["cache"]["q16"]["bytes"] + 20_000  # zstd and the tables' own bytes
    loaded, _ = models.load(str(tmp_path / "run/round-01/compressed/model"))
    assert models.num_parameters(loaded) == planned["compression"]["model_parameters_after"]
