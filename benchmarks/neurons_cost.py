"""What taking neurons out of SmolLM2-135M costs: 35 %, statistics from 61,440 tokens of the embedded corpus.

    python benchmarks/neurons_cost.py

Bars: 5 minutes on two cores, both busy; peak memory the model's weights and 1.5 GB. The peak is that of a process that
loads the model and compresses it, no more; unpacking the GGUF file needs some of it too. How busy the cores are is the
process's own time in times of the wall's, of the number of threads.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from _record import record

import sparsekd
from sparsekd import corpus
from sparsekd.models import num_parameters
from sparsekd.recipe import load_recipe
from sparsekd.run.machine import peak_memory_bytes

NUM_TOKENS, LENGTH, REDUCTION = 61_440, 512, 0.35


def main() -> None:
    model, tokenizer = sparsekd.load()
    loaded, bar = peak_memory_bytes(), num_parameters(model) * 4 + 1_500_000_000
    settings = (f"corpus.num_blocks={NUM_TOKENS // LENGTH}", f"corpus.seq_len={LENGTH}")
    recipe = load_recipe("demo", (*settings, "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    blocks = torch.from_numpy(np.stack(built.tokens(built.train_ids)).astype(np.int64))
    start, busy = time.perf_counter(), time.process_time()
    sparsekd.compress(model, blocks, method="neurons", reduction=REDUCTION)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    figures = {"tokens": blocks.numel(), "reduction": REDUCTION, "seconds": seconds, "bar_seconds": 300}
    figures |= {"busy": busy / seconds / torch.get_num_threads(), "threads": torch.get_num_threads()}
    memory = {"peak_memory_bytes": peak_memory_bytes(), "peak_after_loading_bytes": loaded, "bar_bytes": bar}
    record("neurons_cost", figures | memory)


if __name__ == "__main__":
    main()
