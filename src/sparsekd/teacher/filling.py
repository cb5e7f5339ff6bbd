"""The forward pass that fills the cache: one pass of the dense model over the corpus, batched by length.

Shape letters: B and N blocks, L positions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files
from sparsekd.corpus import ALL, Share
from sparsekd.device import Batches, beside
from sparsekd.errors import DataError
from sparsekd.models import config_hash, real_vocab_size, tokenizer_hash, weights_hash
from sparsekd.teacher.cache import Cache
from sparsekd.teacher.codecs import Codec, Samples, Targets, codec_for
from sparsekd.teacher.merging import owns
from sparsekd.teacher.online import Mixture, TeacherModel, context_of, distributions, members, teacher_logits
from sparsekd.teacher.selecting import by_chunks, sampled_distribution, uniforms
from sparsekd.teacher.shards import ALIGNMENT, Identity
from sparsekd.teacher.writing import Writer


def identity(
    model: TeacherModel, tokenizer_hash: str, corpus_fingerprint: str, codec: Codec, seed: int = 42
) -> Identity:
    """Everything that decides the content of a cache; two caches with equal identities are interchangeable."""
    optional: Identity = {"weights": model.weights} if isinstance(model, Mixture) else {}
    if isinstance(model, Mixture) and model.mean != "arithmetic":
        optional["mixture"] = model.mean
    if torch.is_autocast_enabled(members(model)[0].device.type):  # another number format than that of the weights
        optional["products"] = "bfloat16"
    return optional | {
        "teacher": _of_each(model, weights_hash),
        "config": _of_each(model, config_hash),
        "tokenizer": tokenizer_hash,
        "vocab_size": codec.vocab_size,
        "corpus": corpus_fingerprint,
        "codec": codec.name,
        "top_k": codec.top_k,
        "seed": seed if codec.name == "sampled" else None,
        "temperature": 1.0,
        "dtype": _of_each(model, lambda teacher: str(teacher.dtype).removeprefix("torch.")),
        "alignment": ALIGNMENT,
    }


def _of_each(model: TeacherModel, value: Callable[[PreTrainedModel], str]) -> str | list[str]:
    return [value(teacher) for teacher in model.models] if isinstance(model, Mixture) else value(model)


def fill(
    model: TeacherModel,
    folder: Path,
    blocks: dict[int, np.ndarray],
    *,
    tokenizer_hash: str,
    corpus_fingerprint: str,
    codec: str = "q16",
    top_k: int | None = None,
    vocab_size: int | None = None,
    seed: int = 42,
    blocks_per_shard: int = 64,
    batch_size: int = 4,
    share: Share = ALL,
    separator: int | None = None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> Cache | None:
    """Caches `model`'s distributions of all `blocks` (by id) in `folder` and opens the result; or one `share` of them,
    which `merge_shares` completes.

    `vocab_size` leaves out the padding of the embeddings; `seed` matters to `sampled` only. Killed at any moment and
    called again, it continues after the last whole shard. `on_tokens` hears how many were there before, then of each
    pass; `say` of a `batch_size` that was halved for memory. Raises `ResourceError` when disk or memory are too small,
    `DataError` when the model's output is not finite or a block is longer than the model's context, `UsageError` when
    another process is at it.
    """
    chosen = codec_for(codec, top_k, vocab_size or int(model.config.get_text_config().vocab_size))
    _require_context(model, blocks)
    made_of = identity(model, tokenizer_hash, corpus_fingerprint, chosen, seed)
    order = sorted(blocks, key=lambda block_id: (len(blocks[block_id]), block_id))
    shards = [order[start : start + blocks_per_shard] for start in range(0, len(order), blocks_per_shard)]
    with Writer.open(folder, made_of, share) as writer:
        owned = {n: ids for n, ids in enumerate(shards) if owns(share, n)}
        missing = {n: ids for n, ids in owned.items() if not writer.has(n, ids)}
        num_tokens = sum(len(blocks[block_id]) for ids in missing.values() for block_id in ids)
        if cached := sum(len(blocks[block_id]) for ids in owned.values() for block_id in ids) - num_tokens:
            on_tokens(cached)
        files.require_space(folder, num_tokens * chosen.bytes_per_token, "the teacher cache")
        batches = Batches(batch_size, "cache.batch_size", "corpus.seq_len", say)

        def answer(ids: Sequence[int]) -> list[Any]:
            tokens = torch.from_numpy(np.stack([blocks[i] for i in ids]).astype(np.int64))
            return _targets(model, tokens, ids, chosen, seed, separator)

        # a shard is packed and written while the model answers for the next
        with beside(members(model)[0].device) as background:
            written: Future[None] | None = None
            for number, ids in missing.items():
                targets = []
                for length, equal in itertools.groupby(
                    ids, key=lambda block_id: len(blocks[block_id])
                ):  # nothing is padded
                    for answered in batches.run(list(equal), answer):
                        targets.extend(answered)
                        on_tokens(length * len(answered))
                if written is not None:
                    written.result()
                written = background.submit(writer.add, number, ids, [blocks[i] for i in ids], targets)
            if written is not None:
                written.result()
        writer.finish()
    return Cache(folder) if share.count == 1 else None


def cache_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Int[Tensor, "N L"],
    folder: str | Path,
    *,
    codec: str = "q16",
    top_k: int | None = None,
) -> Cache:
    """Caches `model`'s next-token distributions on `blocks` (token ids) in `folder`; row i becomes block i."""
    fill(
        model,
        Path(folder),
        {i: row.astype(np.int32) for i, row in enumerate(blocks.numpy())},
        tokenizer_hash=tokenizer_hash(tokenizer),
        corpus_fingerprint=hashlib.sha256(blocks.numpy().astype("<i4").tobytes()).hexdigest()[:16],
        codec=codec,
        top_k=top_k,
        vocab_size=real_vocab_size(model, tokenizer),
    )
    return Cache(Path(folder))


def _require_context(model: TeacherModel, blocks: dict[int, np.ndarray]) -> None:
    context = context_of(model)
    longest = max(blocks, key=lambda block_id: len(blocks[block_id]))
    if context is not None and len(blocks[longest]) > context:
        raise DataError(
            f"block {longest} has {len(blocks[longest])} tokens, the model's context is {context}: lower corpus.seq_len"
        )


@torch.inference_mode()
def _targets(
    model: TeacherModel,
    tokens: Int[Tensor, "B L"],
    ids: Sequence[int],
    codec: Codec,
    seed: int,
    separator: int | None,
) -> list[Targets] | list[Samples]:
    if codec.name != "sampled":
        return distributions(model, tokens, codec.top_k, codec.vocab_size, separator)
    logits = teacher_logits(model, tokens, codec.vocab_size, separator)
    return [
        by_chunks(lambda chunk, u: sampled_distribution(chunk, codec.top_k, u), block, uniforms(seed, i, len(block)))
        for i, block in zip(ids, logits, strict=True)
    ]
