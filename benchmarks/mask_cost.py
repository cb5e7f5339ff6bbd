"""What masks cost on SmolLM2-135M: pruning half of the MLP weights, statistics from 61,440 tokens of the embedded
corpus, and what keeping the zeros adds to a training step.

    python benchmarks/mask_cost.py [--tokens 61440] [--rounds 3]

Bars: `magnitude` and `wanda` 1.3 times a plain forward pass over the same text; `sparsegpt` 600 seconds; a training
step 1.03 times the same one whose zeros nobody keeps. Pruning and passes take turns, and so do trainings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _record import record, summary
from training_speed import BATCH, STEPS, our_steps

import sparsekd
from sparsekd import corpus, teacher
from sparsekd.compression import batches_of
from sparsekd.device import fast_products
from sparsekd.models import forms
from sparsekd.recipe import load_recipe
from sparsekd.teacher import Cache

LENGTH, PASSES_BATCH, TRAINED_LENGTH = 512, 4, 256
BARS = {"magnitude to a pass": 1.3, "wanda to a pass": 1.3, "sparsegpt, seconds": 600, "zeros kept to not": 1.03}
KINDS = [*itertools.product(("magnitude", "wanda"), ("unstructured", "2:4")), ("sparsegpt", "unstructured")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=61_440)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model, tokenizer = sparsekd.load()
    settings = (f"corpus.num_blocks={given.tokens // LENGTH}", f"corpus.seq_len={LENGTH}")
    recipe = load_recipe("demo", (*settings, "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    blocks = np.stack(built.tokens(built.train_ids)).astype(np.int64)
    figures = pruning(model, torch.from_numpy(blocks), given.rounds) | training(model, blocks, given.rounds)
    record("mask_cost", {"tokens": blocks.size, "rounds": given.rounds, "bars": BARS} | figures)


def pruning(model: Any, blocks: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a pass and of each method, in turns; SparseGPT, which has a bar of its own, once."""
    passes: list[float] = []
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        passes.append(timed(forward, model, blocks))
        for method, pattern in KINDS if number == 0 else KINDS[:-1]:
            options = {"method": method, "pattern": pattern, "reduction": 0.5, "batch_size": PASSES_BATCH}
            seconds[method, pattern].append(timed(sparsekd.compress, copy.deepcopy(model), blocks, **options))
    figures: dict[str, Any] = {"pass, seconds": summary(passes)}
    for (method, pattern), taken in seconds.items():
        figures[f"{method} {pattern}, seconds"] = summary(taken)
        ratios = [one / plain for one, plain in zip(taken, passes, strict=False)]
        figures[f"{method} {pattern} to a pass"] = summary(ratios)
    return figures


@torch.inference_mode()
def forward(model: Any, blocks: torch.Tensor) -> None:
    with fast_products(model.device):
        for batch in batches_of(blocks, PASSES_BATCH):
            model.get_decoder()(batch.tokens, use_cache=False)


def training(model: Any, blocks: np.ndarray, rounds: int) -> dict[str, Any]:
    """Tokens a second of our training of a masked model, and of the same one with no guard, in turns."""
    short = blocks.reshape(-1, TRAINED_LENGTH)[: (STEPS + 1) * BATCH]
    student = sparsekd.compress(copy.deepcopy(model), method="magnitude", reduction=0.5)
    speeds: dict[str, list[float]] = {"zeros kept": [], "zeros not kept": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        teacher.fill(model, cache, dict(enumerate(short)), tokenizer_hash="benchmark", corpus_fingerprint="benchmark")
        for _ in range(rounds):
            for name, kept in speeds.items():
                guard = forms.guard if name == "zeros kept" else lambda _: None
                with patch.object(forms, "guard", guard):
                    found = our_steps(copy.deepcopy(student), short, Cache(cache), BATCH, bfloat16=False)
                kept.append(found["tokens_per_second"])
    ratios = [free / kept for kept, free in zip(*speeds.values(), strict=True)]
    figures = {f"training, {name}, tokens per second": summary(found) for name, found in speeds.items()}
    return figures | {"training step, zeros kept to not": summary(ratios)}


def timed(call: Any, *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
