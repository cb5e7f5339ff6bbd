"""Seconds to truncate all 90 MLP matrices of SmolLM2-135M, statistics collected before, for each method and format.

    python benchmarks/truncation_time.py

Solving, factoring, choosing pivots and replacing the layers; `statistics` is the pass over 8,192 tokens, forward and
backward. Bar: 60 s.
"""

from __future__ import annotations

import copy
import time
from unittest.mock import patch

import numpy as np
import torch
from _record import record

import sparsekd
from sparsekd import compression, corpus
from sparsekd.compression import statistics
from sparsekd.recipe import Compress, load_recipe


def main() -> None:
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo", ("corpus.num_blocks=32", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    tokens = torch.from_numpy(np.stack(built.tokens(built.train_ids)).astype(np.int64))
    start = time.perf_counter()
    moments = statistics.collect(model, tokens.split(4), curvature=True)
    figures: dict[str, object] = {"statistics_seconds": time.perf_counter() - start, "tokens": tokens.numel()}
    with patch.object(statistics, "collect", lambda *args, **options: moments):
        for method in compression.METHODS:
            for format in ("pivot", "lowrank"):
                student = copy.deepcopy(model)
                options = {"reduction": 0.15, "method": method, "format": format}
                start = time.perf_counter()
                plan = compression.truncate(student, tokens, Compress(**options))
                figures[f"{method}_{format}_seconds"] = time.perf_counter() - start
    record("truncation_time", figures | {"matrices": len(plan.matrices)})


if __name__ == "__main__":
    main()
