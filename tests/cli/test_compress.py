"""`sparsekd compress`: the model is as small as was planned, and what another choice would give up is said."""

from pathlib import Path
from typing import Any

import pytest

from sparsekd import models
from sparsekd.compression import widths


def test_dry_run_tells_what_the_run_then_does(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    planned = sparsekd("run", tiny_recipe, "--dry-run", "--json", "--reduction", "0.3").json
    made = sparsekd("compress", tiny_recipe, "--json", "--reduction", "0.3", "--out", tmp_path / "run").json
    for name in ("model_parameters_before", "model_parameters_after", "mlp_reduction"):
        assert made["compress"][name] == planned["compression"][name]
    assert made["cache"]["bytes"] < 2 * planned["cache"]["q16"]["bytes"] + 20_000  # zstd and the tables' own bytes
    loaded, _ = models.load(str(tmp_path / "run/round-01/compressed/model"))
    assert models.num_parameters(loaded) == planned["compression"]["model_parameters_after"]


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_either_allocation_of_neurons_is_said(
    allocation: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    own = [f"compress.neurons.allocation={allocation}", "compress.neurons.multiple=4", "compress.method=neurons"]
    flags = [part for setting in own for part in ("--set", setting)]
    outcome = sparsekd("compress", tiny_recipe, *flags, "--reduction", "0.3", "--out", tmp_path / "run", "--json")
    made = outcome.json["compress"]
    assert made["predicted_kl"] == made["predicted_kl_by_allocation"][allocation]
    line = widths.compared(made, "neurons", allocation)
    assert f"  {line}" in (outcome.out + outcome.err).splitlines(), outcome


def test_of_low_rank_there_is_nothing_to_compare(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    outcome = sparsekd("compress", tiny_recipe, "--reduction", "0.3", "--out", tmp_path / "run", "--json")
    assert outcome.json["compress"]["predicted_kl_by_allocation"] is None
    assert "predicted KL" not in outcome.err
