"""Tokens a second of the cache stage against the bare forward pass on the same blocks, in turns.

    python benchmarks/cache_speed.py [--bfloat16]

The bare pass is `model(input_ids).logits` and nothing else. The cache stage is the whole of it: forward pass,
distributions, encoding, Parquet shards on disk, and the hash of the weights, half a second whatever the text. Bar: at
least 0.93. With `--bfloat16` both multiply in bfloat16, with weights in float32, and the bare pass leaves its logits in
bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _record import record, summary

import sparsekd
from sparsekd import corpus, teacher
from sparsekd.recipe import load_recipe

ROUNDS, BATCH, BLOCKS = 3, 4, 80


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bfloat16", action="store_true")
    bfloat16 = parser.parse_args().bfloat16
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo", (f"corpus.num_blocks={BLOCKS}", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    blocks = {number: block.tokens for number, block in enumerate(built.blocks[:BLOCKS])}
    tokens = torch.from_numpy(np.stack(list(blocks.values())).astype(np.int64))

    def bare() -> None:
        with torch.inference_mode():
            for batch in tokens.split(BATCH):
                _ = model(input_ids=batch, use_cache=False).logits

    def cache() -> None:
        with tempfile.TemporaryDirectory() as folder:
            made_from = {"tokenizer_hash": "benchmark", "corpus_fingerprint": "benchmark"}
            teacher.fill(model, Path(folder), blocks, batch_size=BATCH, **made_from)

    bare()
    speeds: dict[str, list[float]] = {"bare": [], "cache": []}
    for _ in range(ROUNDS):
        for name, function in (("bare", bare), ("cache", cache)):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                function()
            speeds[name].append(tokens.numel() / (time.perf_counter() - start))
    ratios = [c / b for c, b in zip(speeds["cache"], speeds["bare"], strict=True)]
    figures = {f"{name}_tokens_per_second": summary(values) for name, values in speeds.items()}
    figures |= {"ratio": summary(ratios), "tokens": tokens.numel(), "rounds": ROUNDS}
    record("cache_speed_bfloat16" if bfloat16 else "cache_speed", figures)


if __name__ == "__main__":
    main()
