"""Size, fidelity and reading speed of the cache's codecs, on SmolLM2-135M and about 4,096 tokens of real text.

    python benchmarks/cache_codecs.py [DATA]

DATA is a folder as recipes/local-mixture.yaml describes it; without it, text that installed packages carry. Bytes are
those of the shards on disk. The KL is that of the kept tokens and the tail, decoded against as they were before
encoding. Reading is `Cache.read` of every block in random order, the shards open and not. Bars at k = 32: q16 at
most 110 bytes a token, q8 90, sampled (12 ids) 40; KL at most 5e-5 nats; 300,000 tokens a second.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record, summary

import sparsekd
from sparsekd import corpus, teacher
from sparsekd.recipe import load_recipe
from sparsekd.teacher import CODECS, Cache, Targets, codec_for

BLOCKS, ROUNDS = 16, 20
ROOT = Path(__file__).parents[1]


def kl(decoded: Targets, stored: Targets) -> torch.Tensor:
    def normalised(targets: Targets) -> torch.Tensor:
        entries = torch.cat([targets.log_probs, targets.log_tail[:, None]], -1).double()
        return entries - entries.logsumexp(-1, keepdim=True)

    q, p = normalised(decoded), normalised(stored)
    return (q.exp() * (q - p)).sum(-1)


def reading_speed(cache: Cache, blocks: dict[int, np.ndarray], num_tokens: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def read(opened: Cache) -> float:
        start = time.perf_counter()
        for block_id in generator.permutation(len(blocks)).tolist():
            opened.read(block_id, blocks[block_id])
        return num_tokens / (time.perf_counter() - start)

    first = [read(Cache(cache.folder)) for _ in range(ROUNDS)]
    again = [read(cache) for _ in range(ROUNDS)]
    return {"first_tokens_per_second": summary(first), "tokens_per_second": summary(again)}


def main() -> None:
    model, tokenizer = sparsekd.load()
    sizes = (f"corpus.num_blocks={BLOCKS}", "corpus.num_validation_blocks=4")
    if len(sys.argv) > 1:
        recipe = load_recipe(str(ROOT / "recipes/local-mixture.yaml"), (f"corpus.root={sys.argv[1]}", *sizes))
    else:
        recipe = load_recipe("demo", sizes)
    built = corpus.build(recipe.corpus, {}, tokenizer, recipe.seed)
    blocks = dict(enumerate(built.tokens(built.train_ids)))
    num_tokens = sum(map(len, blocks.values()))
    num_rows = num_tokens - len(blocks)
    vocab_size = model.config.vocab_size
    with torch.inference_mode():
        logits = {i: model(torch.from_numpy(b.astype(np.int64))[None]).logits[0, :-1] for i, b in blocks.items()}
    figures: dict[str, Any] = {"tokens": num_tokens, "vocabulary": vocab_size}
    with tempfile.TemporaryDirectory() as scratch:
        for name in CODECS:
            folder = Path(scratch) / name
            made_from = {"tokenizer_hash": "benchmark", "corpus_fingerprint": "benchmark"}
            cache = teacher.fill(model, folder, blocks, codec=name, **made_from)
            assert cache is not None
            found: dict[str, Any] = {
                "top_k": cache.top_k,
                "bytes_per_token": cache.num_bytes / num_rows,
                "bytes_per_token_before_zstd": codec_for(name, None, vocab_size).bytes_per_token,
            }
            if name != "sampled":
                errors, expected = [], []
                for block_id, block in blocks.items():
                    decoded = cache.read(block_id, block)
                    assert isinstance(decoded, Targets)
                    errors.append(kl(decoded, teacher.top_k_distribution(logits[block_id], cache.top_k)))
                    expected.append(torch.from_numpy(np.asarray(cache.codec.expected_kl(decoded))))
                error = torch.cat(errors)
                found["kl_nats"] = {"mean": float(error.mean()), "p99": float(error.quantile(0.99))}
                found["expected_kl_nats"] = float(torch.cat(expected).mean())
            figures[name] = found | reading_speed(cache, blocks, num_tokens)
    record("cache_codecs", figures)


if __name__ == "__main__":
    main()
