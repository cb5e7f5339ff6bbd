"""Caches of a tiny model that is sure of itself, on blocks of different lengths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsekd.teacher import Cache, Targets, codec_for, fill
from sparsekd.teacher.filling import identity

TOP_K = 8
LENGTHS = [24, 24, 9, 24, 17, 9, 24, 17, 2, 24]


def sure(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """With an output layer twenty times as large, so that its distributions are far from uniform."""
    made = make_model("llama")
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20.0)
    return made


def ragged() -> dict[int, np.ndarray]:
    """Blocks of different lengths, whose ids are neither dense nor sorted."""
    generator = np.random.default_rng(0)
    return {97 - 7 * i: generator.integers(0, 400, length).astype(np.int32) for i, length in enumerate(LENGTHS)}


def filled(model: PreTrainedModel, folder: Path, blocks: dict[int, np.ndarray], **changes: Any) -> Cache:
    options = {"tokenizer_hash": "t", "corpus_fingerprint": "c", "top_k": TOP_K, "blocks_per_shard": 3, "batch_size": 2}
    fill(model, folder, blocks, **{**options, **changes})
    return Cache(folder)


def made_of(model: PreTrainedModel, tokenizer_hash: str = "t", corpus: str = "c", top_k: int = TOP_K) -> dict[str, Any]:
    return identity(model, tokenizer_hash, corpus, codec_for("q16", top_k, 400))


def equal(a: Targets, b: Targets) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def targets(token: int, log_prob: float, log_tail: float) -> Targets:
    return Targets(torch.tensor([[token]]), *map(torch.tensor, ([[log_prob]], [log_tail], [0.0])))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
