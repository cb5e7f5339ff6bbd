"""Our training step against two loops written by hand: tokens a second and peak memory, in turns.

    python benchmarks/training_speed.py [--peers PYTHON] [--method neurons] [--bfloat16] [--loops NAME ...]

- `fine-tuning`: cross-entropy alone, `model(input_ids, labels=...)`, no teacher. Bars: 1.0 x its speed, 0.7 x
  its memory.
- `dense fine-tuning`: the same of the model before anything was removed. Bars of `--bfloat16` with `neurons`: 1.25 x
  its speed, 0.75 x its memory.
- `plain KD`: the same loss as ours in the plainest way, the teacher's rows ready in memory, full logits, autograd.
- `ours`: `distillation.train` itself, reading its targets from the cache on disk; the batch at once.
- `ours, compiled`: the same with the layers compiled, as in trainings of 262,144 tokens and more in bfloat16; the
  compiler's time, in the first step, is not counted.
- `ours in parts`: the same steps, their batch in micro batches of two blocks, as the demo's preset has it.
- `ours block by block`: the same in micro batches of one.
- `GKDTrainer`: TRL's, with the dense model as its online teacher and no text generated (lmbda 0, beta 0). Bars: 1.8 x
  its speed, 0.6 x its memory.
- `DistillKit`: its `DistillationTrainer` with its default losses on a dataset of the teacher's rows, not compressed.
  Its memory is to be beaten.

`--peers` is the interpreter of an environment that has trl (1.16.0 was measured) and distillkit beside what this one
has. DistillKit is not on PyPI, and its pins are older than what this project needs: `pip install --no-deps` of its
repository (commit a61c2e7 was measured), then click and pydantic.

With `--bfloat16` all multiply in bfloat16, with float32 weights: ours as `precision: auto` does on such a processor,
the others by autocast (`bf16` of their settings). Bars: 1.8 x GKDTrainer, 1.4 x DistillKit.

All train the same compressed model (by `--method`: 15 % of the MLP parameters removed, by neurons 35 %) on the same
blocks with the same optimizer, clipping included. Each turn is a process of its own, so that its peak memory is its
own. `waits` is the share of our steps in which the loop waited for blocks and targets (bar: 1 %).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from _record import record, summary

import sparsekd
from sparsekd import corpus, distillation, teacher
from sparsekd.compression import compress
from sparsekd.distillation import loop as training
from sparsekd.distillation import worker
from sparsekd.recipe import Distill, load_recipe
from sparsekd.run.machine import peak_memory_bytes
from sparsekd.teacher import Cache, Targets

ROUNDS, BATCH, STEPS, ALPHA, TEMPERATURE = 3, 4, 4, 0.5, 2.0
OURS = {"ours": BATCH, "ours, compiled": BATCH, "ours in parts": 2, "ours block by block": 1}  # blocks at once
LOOPS = ("dense fine-tuning", "fine-tuning", "plain KD", *OURS)
PEERS = ("GKDTrainer", "DistillKit")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=2, metavar=("LOOP", "FOLDER"), help="one turn; used by the script itself")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with trl and distillkit")
    parser.add_argument("--method", choices=["whitened", "neurons"], default="whitened")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--loops", nargs="+", help="which of them; all by default")
    given = parser.parse_args()
    loops = [name for name in (*LOOPS, *(PEERS if given.peers else ())) if name in (given.loops or (*LOOPS, *PEERS))]
    environment = os.environ | {"PYTHONPATH": str(Path(sparsekd.__file__).parents[1])}  # the other has no sparsekd
    if given.child:
        print(json.dumps(turn(given.child[0], Path(given.child[1]), given.bfloat16)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.method)
        turns: dict[str, list[dict[str, float]]] = {loop: [] for loop in loops}
        for _ in range(ROUNDS):
            for loop in loops:
                python = given.peers if loop in PEERS else sys.executable
                command = [python, __file__, "--child", loop, folder, *(["--bfloat16"] if given.bfloat16 else [])]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                turns[loop].append(json.loads(output.splitlines()[-1]))
    figures: dict[str, Any] = {"method": given.method, "tokens": STEPS * BATCH * 256, "rounds": ROUNDS}
    for loop in loops:
        figures[loop] = {name: summary([one[name] for one in turns[loop]]) for name in turns[loop][0]}
    for ours, other in itertools.product([loop for loop in loops if loop in OURS], [x for x in loops if x not in OURS]):
        pairs = list(zip(turns[ours], turns[other], strict=True))
        for name in turns[other][0]:
            figures[f"{ours} to {other}, {name}"] = summary([mine[name] / theirs[name] for mine, theirs in pairs])
    figures["bfloat16"] = given.bfloat16
    suffixes = ("_neurons" if given.method == "neurons" else "") + ("_bfloat16" if given.bfloat16 else "")
    record("training_speed" + suffixes + ("_chosen" if given.loops else ""), figures)


def prepare(folder: Path, method: str) -> None:
    """The compressed model, the blocks and the teacher's cache, on disk."""
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo", ("corpus.num_blocks=24", "corpus.num_validation_blocks=2"))
    built = corpus.build(recipe.corpus, {}, tokenizer, seed=42)
    blocks = np.stack([block.tokens for block in built.blocks[: (STEPS + 1) * BATCH]])
    np.save(folder / "blocks.npy", blocks)
    by_id = dict(enumerate(blocks))
    teacher.fill(model, folder / "cache", by_id, tokenizer_hash="benchmark", corpus_fingerprint="benchmark")
    sparsekd.save(model, tokenizer, folder / "dense")
    reduction = 0.35 if method == "neurons" else 0.15
    compressed = compress(model, torch.from_numpy(blocks.astype(np.int64)), method=method, reduction=reduction)
    sparsekd.save(compressed, tokenizer, folder / "model")


def turn(loop: str, folder: Path, bfloat16: bool) -> dict[str, float]:
    """Trains on all blocks but the first batch, which warms up; peak memory is the process's above the loaded model."""
    blocks = np.load(folder / "blocks.npy").astype(np.int64)
    model, _ = sparsekd.load(str(folder / ("dense" if loop == "dense fine-tuning" else "model")))
    cache = Cache(folder / "cache")
    before = peak_memory_bytes()
    if loop in OURS:
        with patch.object(training, "is_worth_compiling", lambda *_: loop == "ours, compiled"):
            found = our_steps(model, blocks, cache, OURS[loop], bfloat16)
    elif loop in PEERS:
        found = peer_trainer(loop, model, blocks, cache, folder, bfloat16)
    else:
        targets = [cache.read(number, tokens.astype(np.int32)) for number, tokens in enumerate(blocks)]
        found = hand_written(model, blocks, targets if loop == "plain KD" else None, bfloat16)
    peak = peak_memory_bytes()
    return found | {"peak_bytes": peak, "peak_bytes_above_the_model": peak - before}


def hand_written(model: Any, blocks: np.ndarray, targets: list[Any] | None, bfloat16: bool) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for first in range(0, len(blocks), BATCH):
        if first == BATCH:
            start = time.perf_counter()
        tokens = torch.from_numpy(blocks[first : first + BATCH])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            if targets is None:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                batch = Targets(*(torch.cat(column) for column in zip(*targets[first : first + BATCH], strict=True)))
                logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = plain_loss(logits.float(), tokens[:, 1:].flatten(), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"tokens_per_second": blocks[BATCH:].size / (time.perf_counter() - start)}


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


def our_steps(model: Any, blocks: np.ndarray, cache: Cache, micro_batch_size: int, bfloat16: bool) -> dict[str, float]:
    """`distillation.train` with its validation left out of the clock, and how long it waited for its data."""
    data = distillation.Data(list(blocks), lambda epoch: np.arange(len(blocks)), [0], cache)
    settings: dict[str, Any] = {"batch_size": BATCH, "micro_batch_size": micro_batch_size, "validations": 1}
    settings["precision"] = "bfloat16" if bfloat16 else "float32"
    options = Distill(alpha=ALPHA, temperature=TEMPERATURE, **settings)
    waits: list[float] = []
    batch_of = worker.Worker._batch

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        batch = batch_of(*args)
        waits.append(time.perf_counter() - start)
        return batch

    with patch.object(worker.Worker, "_batch", timed):
        history = distillation.train(model, data, options)
    seconds = sum(step.seconds for step in history.steps[1:])
    batches = STEPS * BATCH // micro_batch_size
    found = {"tokens_per_second": blocks[BATCH:].size / seconds, "first_step_seconds": history.steps[0].seconds}
    return found | {"waits": sum(waits) / len(waits) * batches / seconds}


def peer_trainer(
    loop: str, model: Any, blocks: np.ndarray, cache: Cache, folder: Path, bfloat16: bool
) -> dict[str, float]:
    import datasets
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.tensor(np.array([row[name] for row in rows])) for name in rows[0]}
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}

    rows: dict[str, Any] = {"input_ids": blocks.tolist()}
    if loop == "DistillKit":
        targets = [cache.read(number, tokens.astype(np.int32)) for number, tokens in enumerate(blocks)]
        # it wants a row for the last token of a block as well
        padded = [[F.pad(value, [0, 0, 0, 1]).numpy() for value in (t.ids, t.log_probs)] for t in targets]
        rows |= {"token_ids": [ids for ids, _ in padded], "top_values": [values for _, values in padded]}
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 3e-4}
    options |= {"use_cpu": True, "bf16": bfloat16, "gradient_checkpointing": False, "report_to": []}
    options |= {"save_strategy": "no", "disable_tqdm": True, "max_length": blocks.shape[1]}
    options |= {"output_dir": str(folder / loop)}
    dense, tokenizer = sparsekd.load()
    shared: dict[str, Any] = {
        "model": model,
        "data_collator": collate,
        "train_dataset": datasets.Dataset.from_dict(rows),
        "processing_class": tokenizer,
        "callbacks": [Clock()],
    }
    trainer = gkd_trainer(dense, options, shared) if loop == "GKDTrainer" else distillkit_trainer(options, shared)
    del dense
    trainer.train()
    return {"tokens_per_second": blocks[BATCH:].size / (ends[-1] - ends[0])}


def gkd_trainer(dense: Any, options: dict[str, Any], shared: dict[str, Any]) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    config = GKDConfig(lmbda=0.0, beta=0.0, temperature=TEMPERATURE, **options)
    return GKDTrainer(teacher_model=dense, args=config, **shared)


def distillkit_trainer(options: dict[str, Any], shared: dict[str, Any]) -> Any:
    from distillkit.compression import (  # pyright: ignore[reportMissingImports]
        DistributionQuantizationConfig,
        LogprobCompressor,
    )
    from distillkit.configuration import DistillationRunConfig  # pyright: ignore[reportMissingImports]
    from distillkit.signals import OfflineSignalSource  # pyright: ignore[reportMissingImports]
    from distillkit.trainer import DistillationTrainer  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig  # pyright: ignore[reportMissingImports]

    values = {"model": "given", "output_path": "given", "sequence_length": options["max_length"]}
    values |= {"teacher": {"kind": "dataset"}, "dataset": {"train_dataset": {"disk_path": "given"}}}
    losses = [{"function": "cross_entropy", "weight": 1 - ALPHA}]
    losses += [{"function": "kl", "weight": ALPHA, "temperature": TEMPERATURE, "missing_probability_handling": "zero"}]
    config = DistillationRunConfig(**values, loss_functions=losses)
    vocab_size = shared["model"].config.vocab_size
    codec = DistributionQuantizationConfig(d=vocab_size, k=32, exact_k=32, residual_bins=[])
    source = OfflineSignalSource(LogprobCompressor(codec), vocab_size)
    settings = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, **options)
    return DistillationTrainer(config=config, signal_source=source, true_vocab_size=vocab_size, args=settings, **shared)


if __name__ == "__main__":
    main()
