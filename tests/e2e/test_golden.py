"""The numbers of one small run, kept: what may not change unless somebody means it to.

Renew the figures only in a commit whose message says which change of numerics is the reason (a refactor is none), by
running this file and copying what the failing assertions print. Token ids are compared exactly; what is rounded
differently on other processors is compared with a tolerance.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sparsekd import corpus, pipeline
from sparsekd.recipe import load_recipe
from sparsekd.teacher.cache import Cache
from sparsekd.teacher.codecs import Targets

BLOCKS = "e987e3aececcee82"  # sha256 of the blocks' tokens and of the order of the first epoch, first 16 digits
KEPT = "58b0d60cf80afd88"  # of the token ids that the cache keeps, likeliest first
LOG_PROBABILITY, LOG_TAIL = -5.726155, -0.02644542  # means over the cache
VALIDATION_LOSSES = [2.983464, 2.951514, 2.935248]
FINAL_LOSS = 2.943966  # of the last training step


def digest(arrays: list[np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array, "<i8").data)
    return hashed.hexdigest()[:16]


def test_the_numbers_of_a_small_run_are_what_they_were(tiny_recipe: Path, tmp_path: Path) -> None:
    settings = ("compress.method=two-sided", "compress.allocation=global", "compress.reduction=0.3")
    pipeline.run(load_recipe(str(tiny_recipe), settings), tmp_path / "run", until="distill")
    made = corpus.load(tmp_path / "run/corpus")
    assert digest([*(block.tokens for block in made.blocks), made.order(42, 0)]) == BLOCKS
    cache = Cache(tmp_path / "run/round-01/cache")
    rows = [cache.read(i, block.tokens) for i, block in enumerate(made.blocks)]
    assert all(isinstance(row, Targets) for row in rows)
    assert digest([row.ids.numpy() for row in rows]) == KEPT
    means = [np.mean([getattr(row, name).mean().item() for row in rows]) for name in ("log_probs", "log_tail")]
    assert means == pytest.approx([LOG_PROBABILITY, LOG_TAIL], rel=1e-5)
    history = json.loads((tmp_path / "run/round-01/distilled/stage.json").read_text())
    assert [validation["loss"] for validation in history["validations"]] == pytest.approx(VALIDATION_LOSSES, rel=1e-5)
    assert history["steps"][-1]["loss"] == pytest.approx(FINAL_LOSS, rel=1e-5)
