"""What the truncation of SmolLM2-135M costs: statistics from 16,384 tokens, solvers, allocation, probe, peak memory.

    python benchmarks/truncation_cost.py

Bars: Grams at most 1.25 x the bare forward pass (`model(input_ids).logits`, in turns), all solvers and the allocation
without the probe 60 s, the probe 10 minutes, peak memory the model's weights and 1.5 GB. The peak is that of a
process that loads the model and truncates it two-sided, no more; unpacking the GGUF file needs some of it too.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _record import record, summary

import sparsekd
from sparsekd import compression, corpus
from sparsekd.compression import statistics
from sparsekd.models.loading import num_parameters
from sparsekd.recipe import Compress, compress_section, load_recipe
from sparsekd.run.machine import peak_memory_bytes

NUM_TOKENS, ROUNDS, PROBE_TOKENS = 16_384, 3, 1024


def peak() -> dict[str, int]:
    """What loading and truncating take, and the bar; of a process that does nothing else."""
    model, tokenizer = sparsekd.load()
    loaded = peak_memory_bytes()
    bar = num_parameters(model) * 4 + 1_500_000_000
    truncate(model, batches_of(tokenizer), compress_section({"method": "two-sided", "allocation": "global"}))
    return {"peak_memory_bytes": peak_memory_bytes(), "peak_after_loading_bytes": loaded, "bar_bytes": bar}


def truncate(model: Any, batches: list[torch.Tensor], section: Compress) -> None:
    calibration = compression.Calibration(model, compression.batches_of(batches, section.batch_size))
    compression.apply(model, lambda step: calibration, section)


def batches_of(tokenizer: Any) -> list[torch.Tensor]:
    recipe = load_recipe("demo", (f"corpus.num_blocks={NUM_TOKENS // 256}", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    tokens = torch.from_numpy(np.stack(built.tokens(built.train_ids)).astype(np.int64))
    return list(tokens.split(4))


def main() -> None:
    done = subprocess.run([sys.executable, __file__, "--peak"], check=True, capture_output=True, text=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = sparsekd.load()
    batches = batches_of(tokenizer)

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
    figures["tokens"] = NUM_TOKENS
    with patch.object(statistics, "collect", lambda *_, **__: copy.deepcopy(moments)):
        for name, options in {
            "two-sided, global, pivot": compress_section({"method": "two-sided", "allocation": "global"}),
            "whitened, uniform, lowrank": compress_section({"format": "lowrank"}),
            "svd, energy, lowrank": compress_section({"method": "svd", "allocation": "energy", "format": "lowrank"}),
        }.items():
            student = copy.deepcopy(model)
            start = time.perf_counter()
            truncate(student, batches, options)
            figures[f"{name}: seconds without the statistics"] = time.perf_counter() - start
        start = time.perf_counter()
        probed = {"method": "two-sided", "allocation": "global", "probe_tokens": PROBE_TOKENS}
        options = compress_section(probed)
        truncate(copy.deepcopy(model), batches, options)
        figures[f"with the probe on {PROBE_TOKENS} tokens: seconds"] = time.perf_counter() - start
    record("truncation_cost", figures | memory)


if __name__ == "__main__":
    print(json.dumps(peak())) if "--peak" in sys.argv else main()
