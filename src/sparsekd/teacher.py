"""The forward pass that fills the cache: one pass of the dense model over the corpus, batched by length.

Shape letters: B blocks, L positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files
from sparsekd.cache import ALIGNMENT, CODEC, Cache, Targets, Writer, bytes_per_token
from sparsekd.models import document_positions, tokenizer_hash, weights_hash

_CHUNK = 128  # positions whose distribution is worked out at once; bounds the temporaries beside the logits


def identity(model: PreTrainedModel, tokenizer: str, corpus_fingerprint: str, top_k: int) -> dict[str, Any]:
    """Everything that decides the content of a cache; two caches with equal identities are interchangeable."""
    return {
        "teacher": weights_hash(model),
        "tokenizer": tokenizer,
        "corpus": corpus_fingerprint,
        "top_k": top_k,
        "codec": CODEC,
        "temperature": 1.0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "alignment": ALIGNMENT,
    }


@torch.inference_mode()
def top_k_distribution(logits: Float[Tensor, "*N V"], top_k: int) -> Targets:
    """The `top_k` likeliest tokens of each row, their log-probabilities over all of V, and the log of the rest's mass.

    The tail is summed over the other tokens themselves, not taken as 1 minus the top, so it is exact when tiny. It is
    at least e^-30, which fp16 can hold as a logarithm.
    """
    z = logits.float()
    top, ids = z.topk(top_k, dim=-1)
    m = top[..., :1]
    e = (z - m).exp_()
    head = torch.exp(top - m).sum(-1)
    tail = e.scatter_(-1, ids, 0.0).sum(-1)
    log_sum = (head + tail).log()
    log_tail = (tail.log() - log_sum).clamp_min(-30.0)
    return Targets(ids, top - m - log_sum[..., None], log_tail)


@torch.inference_mode()
def distributions(
    model: PreTrainedModel, tokens: Int[Tensor, "B L"], top_k: int, separator: int | None = None
) -> list[Targets]:
    """Targets of each block: row t is the teacher's distribution of token t + 1.

    With a `separator`, the token that ends a document, packed documents do not see each other.
    """
    on_device = tokens.to(model.device)
    positions = {} if separator is None else {"position_ids": document_positions(on_device, separator)}
    logits = model(input_ids=on_device, use_cache=False, **positions).logits
    result = []
    for block in logits[:, :-1]:
        parts = [top_k_distribution(chunk, top_k) for chunk in block.split(_CHUNK)]
        result.append(Targets(*(torch.cat(columns).cpu() for columns in zip(*parts, strict=True))))
    return result


def fill(
    model: PreTrainedModel,
    folder: Path,
    blocks: dict[int, np.ndarray],
    *,
    tokenizer: str,
    corpus_fingerprint: str,
    top_k: int = 32,
    blocks_per_shard: int = 64,
    batch_size: int = 4,
    separator: int | None = None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> Cache:
    """Caches `model`'s distributions of all `blocks` (by id) in `folder` and opens the result; `tokenizer` is its hash.

    Killed at any moment and called again, it continues after the last whole shard. `on_tokens` hears of progress.
    Raises `ResourceError` when the disk is too small and `DataError` when the model's output is not finite.
    """
    vocab_size = int(model.config.get_text_config().vocab_size)
    top_k = min(top_k, vocab_size - 1)
    num_tokens = sum(len(tokens) for tokens in blocks.values())
    files.require_space(folder, num_tokens * bytes_per_token(top_k, vocab_size), "the teacher cache")
    writer = Writer(folder, identity(model, tokenizer, corpus_fingerprint, top_k), vocab_size)
    order = sorted(blocks, key=lambda block_id: (len(blocks[block_id]), block_id))
    for number, start in enumerate(range(0, len(order), blocks_per_shard)):
        shard = order[start : start + blocks_per_shard]
        if not writer.has(number, shard):
            tokens = [blocks[block_id] for block_id in shard]
            writer.add(number, shard, tokens, _forward(model, tokens, top_k, batch_size, separator, on_tokens))
    writer.finish()
    return Cache(folder)


class Online:
    """The teacher without a cache: its distributions are worked out whenever a block is read."""

    def __init__(self, model: PreTrainedModel, top_k: int = 32, separator: int | None = None):
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._model, self._top_k, self._separator = model, min(top_k, self.vocab_size - 1), separator

    def read(self, block_id: int, tokens: np.ndarray) -> Targets:
        """The distributions of one block, as a `Cache` gives them; `block_id` does not matter here."""
        batch = torch.from_numpy(tokens.astype(np.int64))[None]
        return distributions(self._model, batch, self._top_k, self._separator)[0]


def cache_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Int[Tensor, "N L"],
    folder: str | Path,
    *,
    top_k: int = 32,
) -> Cache:
    """Caches `model`'s next-token distributions on `blocks` (token ids) in `folder`; row i becomes block i."""
    by_id = {i: row.astype(np.int32) for i, row in enumerate(blocks.numpy())}
    made_from = hashlib.sha256(blocks.numpy().astype("<i4").tobytes()).hexdigest()[:16]
    return fill(
        model,
        Path(folder),
        by_id,
        tokenizer=tokenizer_hash(tokenizer),
        corpus_fingerprint=made_from,
        top_k=top_k,
    )


def _forward(
    model: PreTrainedModel,
    blocks: Sequence[np.ndarray],
    top_k: int,
    batch_size: int,
    separator: int | None,
    on_tokens: Callable[[int], None],
) -> list[Targets]:
    """Runs blocks of equal length together; they come sorted by length, so nothing is padded."""
    result: list[Targets] = []
    while len(result) < len(blocks):
        first = len(result)
        batch = [block for block in blocks[first : first + batch_size] if len(block) == len(blocks[first])]
        tokens = torch.from_numpy(np.stack(batch).astype(np.int64))
        result.extend(distributions(model, tokens, top_k, separator))
        on_tokens(tokens.numel())
    return result
