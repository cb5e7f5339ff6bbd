"""What the truncation of SmolLM2-135M costs: statistics from 16,384 tokens, solvers, allocation, probe, peak memory.

    python benchmarks/truncation_cost.py

Bars: Grams at most 1.25 x the bare forward pass (`model(input_ids).logits`, in turns), all solvers and the allocation
without the probe 60 s, the probe 10 minutes, peak memory the model's weights and 1.5 GB. The peak is that of the
process up to the end of a two-sided truncation; unpacking the GGUF file, before, needs some of it for a moment.
"""

from __future__ import annotations

import copy
import io
import time
from unittest.mock import patch

import numpy as np
import torch
from _record import record, summary

import sparsekd
from sparsekd import compression, corpus
from sparsekd.compression import statistics
from sparsekd.models import num_parameters
from sparsekd.recipe import Compress, load_recipe
from sparsekd.run import peak_memory_bytes

NUM_TOKENS, ROUNDS, PROBE_TOKENS = 16_384, 3, 1024


def main() -> None:
    model, tokenizer = sparsekd.load()
    loaded = peak_memory_bytes()
    recipe = load_recipe("demo", (f"corpus.num_blocks={NUM_TOKENS // 256}", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    tokens = torch.from_numpy(np.stack(built.tokens(built.train_ids)).astype(np.int64))
    batches = list(tokens.split(4))

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches[:4]:
                _ = model(input_ids=batch, use_cache=False).logits

    seconds: dict[str, list[float]] = {"bare": [], "grams": []}
    bare()
    for _ in range(ROUNDS):
        for name, function in (("bare", bare), ("grams", lambda: statistics.collect(model, batches[:4]))):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    figures: dict[str, object] = {
        "grams_to_bare_pass": summary([g / b for g, b in zip(seconds["grams"], seconds["bare"], strict=True)]),
        "tokens_of_that_ratio": batches[0].numel() * 4,
    }
    start = time.perf_counter()
    moments = statistics.collect(model, batches, curvature=True)
    figures["curvature_seconds"] = time.perf_counter() - start
    figures["tokens"] = tokens.numel()
    held = [moments]
    kept = io.BytesIO()
    torch.save(moments, kept)
    del moments

    def collected(*_: object, **__: object) -> dict:
        kept.seek(0)
        return held.pop() if held else torch.load(kept, weights_only=False)  # the first call holds nothing beside it

    with patch.object(statistics, "collect", collected):
        student = copy.deepcopy(model)
        for name, options in {
            "two-sided, global, pivot": Compress(method="two-sided", allocation="global"),
            "whitened, uniform, lowrank": Compress(format="lowrank"),
            "svd, energy, lowrank": Compress(method="svd", allocation="energy", format="lowrank"),
        }.items():
            start = time.perf_counter()
            compression.truncate(student, batches, options)
            figures[f"{name}: seconds without the statistics"] = time.perf_counter() - start
            if "peak_memory_bytes" not in figures:
                weights = num_parameters(model) * 4
                own = weights + kept.getbuffer().nbytes  # the benchmark's own copies of the model and of the statistics
                figures["peak_memory_bytes"] = peak_memory_bytes() - own
                figures["peak_after_loading_bytes"] = loaded
                figures["bar_bytes"] = weights + 1_500_000_000
            student = copy.deepcopy(model)
        start = time.perf_counter()
        options = Compress(method="two-sided", allocation="global", probe_tokens=PROBE_TOKENS)
        compression.truncate(student, batches, options)
        figures[f"with the probe on {PROBE_TOKENS} tokens: seconds"] = time.perf_counter() - start
    record("truncation_cost", figures)


if __name__ == "__main__":
    main()
