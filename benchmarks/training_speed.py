"""Tokens a second of our training step against the plainest loop that does the same arithmetic, in turns.

    python benchmarks/training_speed.py

The plain loop is what one would write by hand: the same compressed model, the teacher's rows ready in memory, full
logits, KL with a tail bucket and cross-entropy through autograd, clip, AdamW. Ours is `distillation.train` itself,
reading its targets from the cache on disk. Both take the same blocks. Bar: at least 0.95.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _record import record, summary

import sparsekd
from sparsekd import corpus, distillation, teacher
from sparsekd.cache import Cache, Targets
from sparsekd.compression import compress
from sparsekd.recipe import Distill, load_recipe

ROUNDS, BATCH, STEPS, ALPHA, TEMPERATURE = 3, 4, 3, 0.5, 2.0


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The formula of `losses.py`, written down directly."""
    log_q = F.log_softmax(logits, -1)
    log_q_kept = log_q.gather(-1, targets.ids)
    p, log_head = targets.log_probs.exp(), targets.log_probs.logsumexp(-1)
    student_head = log_q_kept.exp().sum(-1).clamp(max=1 - 1e-6)
    tail = targets.log_tail.exp() * (targets.log_tail - torch.log1p(-student_head))
    between = log_head.exp() * (log_head - student_head.log()) + tail
    soft_p = F.log_softmax(targets.log_probs / TEMPERATURE, -1)
    soft_q = F.log_softmax(log_q_kept / TEMPERATURE, -1)
    inside = p.sum(-1) * TEMPERATURE**2 * (soft_p.exp() * (soft_p - soft_q)).sum(-1)
    return ALPHA * (between + inside).mean() + (1 - ALPHA) * F.cross_entropy(logits, labels)


def plain_steps(model: torch.nn.Module, blocks: np.ndarray, targets: list[Targets]) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    for first in range(0, len(blocks), BATCH):
        tokens = torch.from_numpy(blocks[first : first + BATCH])
        batch = Targets(*(torch.cat(column) for column in zip(*targets[first : first + BATCH], strict=True)))
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        plain_loss(logits, tokens[:, 1:].flatten(), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return blocks.size / (time.perf_counter() - start)


def our_steps(model: torch.nn.Module, blocks: np.ndarray, cache: Cache) -> float:
    data = distillation.Data(list(blocks), lambda epoch: np.arange(len(blocks)), [0], cache)
    options = Distill(batch_size=BATCH, micro_batch_size=BATCH, alpha=ALPHA, temperature=TEMPERATURE, validations=1)
    history = distillation.train(model, data, options)
    return blocks.size / sum(step.seconds for step in history.steps)


def main() -> None:
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo", ("corpus.num_blocks=16", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    blocks = np.stack([block.tokens for block in built.blocks[: STEPS * BATCH]]).astype(np.int64)
    speeds: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        by_id = dict(enumerate(blocks.astype(np.int32)))
        cache = teacher.fill(model, Path(folder), by_id, tokenizer="benchmark", corpus_fingerprint="benchmark")
        targets = [cache.read(number, tokens) for number, tokens in by_id.items()]
        student = compress(model, torch.from_numpy(blocks), reduction=0.15).eval()
        plain_steps(copy.deepcopy(student), blocks[:BATCH], targets)
        for _ in range(ROUNDS):
            speeds["plain"].append(plain_steps(copy.deepcopy(student), blocks, targets))
            speeds["ours"].append(our_steps(copy.deepcopy(student), blocks, cache))
    ratios = [ours / plain for ours, plain in zip(speeds["ours"], speeds["plain"], strict=True)]
    figures = {f"{name}_tokens_per_second": summary(values) for name, values in speeds.items()}
    record("training_speed", figures | {"ratio": summary(ratios), "tokens": blocks.size, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
