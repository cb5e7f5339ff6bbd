"""The whole path on a device that has no float64, as Apple's GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekd import pipeline
from sparsekd.recipe import load_recipe

SCRIPT = Path(__file__).parent.parent / "no_float64.py"
CHANGES = {
    "curvature and probe": ("method=two-sided", "allocation=global", "probe_tokens=64"),
    "whitened": ("method=whitened", "format=lowrank", "allocation=energy"),
    "svd": ("method=svd",),
    "wanda": ("method=wanda", "format=mask"),
    "sparsegpt": ("method=sparsegpt", "reduction=0.5", "pattern=2:4"),
}
SAMPLED = ("cache.codec=sampled", "distill.loss=sampled", "distill.temperature=1", "corpus.document_mask=true")


def on_device(*commands: list[str]) -> str:
    """What commands print, all run by one process."""
    arguments = [word for command in commands for word in ("+", *command, "--set", "device=single", "--json")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_find_what_they_find_on_a_cpu(tiny_recipe: Path, tmp_path: Path) -> None:
    changes = {
        kind: (*(f"compress.{change}" for change in of_kind), *(SAMPLED if kind == "svd" else ()))
        for kind, of_kind in CHANGES.items()
    }
    on_device(
        *(
            ["run", str(tiny_recipe), "--out", str(tmp_path / kind), *(part for one in of for part in ("--set", one))]
            for kind, of in changes.items()
        )
    )
    for kind, overrides in changes.items():
        with sdpa_kernel(SDPBackend.MATH):  # the one that the device has
            pipeline.run(load_recipe(str(tiny_recipe), overrides), tmp_path / f"{kind} here", until="evaluate")
        for name in ("dense", "compressed", "distilled"):
            here, there = (
                json.loads((tmp_path / folder / f"round-01/eval/{name}-text-held.json").read_text())
                for folder in (f"{kind} here", kind)
            )
            # the probe finds KLs of 1e-8 in so small a model: rounding may give one matrix the rank of another
            rel = 1e-3 if kind == "curvature and probe" else 1e-4
            assert there["perplexity"] == pytest.approx(here["perplexity"], rel=rel), (kind, name)


def test_spectra_are_those_of_a_cpu(tiny_recipe: Path) -> None:
    settings = ("--set", "compress.method=two-sided")
    found = json.loads(on_device(["spectrum", str(tiny_recipe), *settings]))["matrices"]
    expected = pipeline.spectrum(load_recipe(str(tiny_recipe), settings[1::2]))["matrices"]
    for matrix, other in zip(found, expected, strict=True):
        for key in ("singular_values", "effective_rank", "weight_effective_rank"):
            assert matrix[key] == pytest.approx(other[key], rel=1e-3)
