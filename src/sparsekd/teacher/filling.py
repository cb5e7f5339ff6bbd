"""The forward pass that fills the cache: one pass of the dense model over the corpus, batched by length.

Shape letters: B blocks, L positions, N positions of one block, V vocabulary, K kept tokens, U drawn tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files
from sparsekd.device import Batches, in_float64
from sparsekd.errors import DataError, UsageError
from sparsekd.models import (
    config_hash,
    document_inputs,
    logits_of,
    real_vocab_size,
    shared_vocab_size,
    tokenizer_hash,
    weights_hash,
)
from sparsekd.teacher.cache import ALIGNMENT, WHOLE, Cache, Part, Samples, Targets, Writer
from sparsekd.teacher.codecs import Codec, codec_for

_CHUNK = 1024  # positions whose distribution is worked out at once; bounds the temporaries beside the logits
_CHUNK_ON_CPU = 16  # their logits, which are read several times, stay in the processor's cache


class Mixture:
    """Several teachers as one, whose distribution is the weighted mean of theirs: sum_i w_i softmax(z_i).

    The teachers may differ in size and architecture, but a token id must mean the same to all; where their embeddings
    are padded differently, the tokens that all know count. `weights` are positive and matter by their ratios only.
    Raises `UsageError` for weights that cannot be used, `MismatchError` for vocabularies that do not match.
    """

    def __init__(self, models: Sequence[PreTrainedModel], weights: Sequence[float]):
        if not models or len(models) != len(weights):
            raise UsageError(
                f"a mixture of {len(models)} teachers with {len(weights)} weights: expected at least one teacher, and "
                "a weight for each"
            )
        for number, weight in enumerate(weights, start=1):
            if not 0 < weight < math.inf:
                raise UsageError(f"the weight of teacher {number} is {weight}: expected a number above 0")
        configs = [model.config.get_text_config() for model in models]
        sizes = {f"teacher {number}": int(config.vocab_size) for number, config in enumerate(configs, start=1)}
        contexts = [context for context in map(_context, models) if context is not None]
        self.models = list(models)
        self.weights = [weight / math.fsum(weights) for weight in weights]
        shared: dict[str, Any] = {
            "vocab_size": shared_vocab_size(sizes),
            "max_position_embeddings": min(contexts, default=None),
        }
        self.config = PreTrainedConfig(**shared)  # what a single model's config is asked for


TeacherModel = PreTrainedModel | Mixture


def identity(
    model: TeacherModel, tokenizer: str, corpus_fingerprint: str, codec: Codec, seed: int = 42
) -> dict[str, Any]:
    """Everything that decides the content of a cache; two caches with equal identities are interchangeable."""
    mixed = {"weights": model.weights} if isinstance(model, Mixture) else {}
    return mixed | {
        "teacher": _of_each(model, weights_hash),
        "config": _of_each(model, config_hash),
        "tokenizer": tokenizer,
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


@torch.inference_mode()
def top_k_distribution(logits: Float[Tensor, "*N V"], top_k: int) -> Targets:
    """The `top_k` likeliest tokens of each row, their log-probabilities over all of V, and the rest's sums.

    The tail is summed over the other tokens themselves, not taken as 1 minus the top, so it is exact when tiny. It is
    at least e^-30, which fp16 can hold as a logarithm.
    """
    z = logits.float()
    top, ids = z.topk(top_k, dim=-1)
    m = top[..., :1]
    e = (z - m).exp_().scatter_(-1, ids, 0.0)
    tail = e.sum(-1)
    tail_half = e.sqrt_().sum(-1)
    log_sum = ((top - m).exp().sum(-1) + tail).log()
    log_tail = (tail.log() - log_sum).clamp_min(-30.0)
    log_tail_half = (tail_half.log() - log_sum / 2).clamp_min(-15.0)
    return Targets(ids, top - m - log_sum[..., None], log_tail, log_tail_half)


@torch.inference_mode()
def sampled_distribution(logits: Float[Tensor, "N V"], num_samples: int, uniforms: Float[Tensor, " N"]) -> Samples:
    """U tokens a row, all different, with weights that sum to one and whose expectation is the row's distribution.

    Token i is drawn with probability pi_i = min(1, p_i / t), where t makes the pi_i sum to U, and then has the weight
    p_i / pi_i: its own p_i where it is certain to be drawn, t elsewhere. So E[weight_i] = p_i (Horvitz and Thompson
    1952); of all ways to draw U tokens it is the one with the least variance (Cohen et al., "Stream sampling for
    variance-optimal estimation of subset sums", SODA 2009). The tokens that are not certain are drawn systematically,
    at u, u + 1, ... along the running sum of pi (Madow 1949), by one of the `uniforms`, in [0, 1), for each row.
    """
    p = in_float64(logits).softmax(-1)
    top, top_ids = p.topk(min(num_samples, p.shape[-1]), dim=-1)
    slots = torch.arange(top.shape[-1], device=p.device)
    left = top.shape[-1] - slots  # slots from each rank on
    share = (1 - top.cumsum(-1) + top) / left  # t, if all ranks before were certain
    num_certain = (top >= share * (1 - 1e-9)).cumprod(-1).sum(-1, keepdim=True)
    is_certain = slots < num_certain
    rest = p.scatter(-1, top_ids, torch.where(is_certain, 0.0, top))
    t = rest.sum(-1, keepdim=True) / (top.shape[-1] - num_certain).clamp_min(1)
    points = (uniforms.to(p)[:, None] + slots - num_certain) * t
    drawn = torch.searchsorted(rest.cumsum(-1), points, right=True).clamp_max(p.shape[-1] - 1)
    ids = torch.where(is_certain, top_ids, drawn)
    return Samples(ids, torch.where(is_certain, top, t).log().float())


@torch.inference_mode()
def distributions(
    model: TeacherModel,
    tokens: Int[Tensor, "B L"],
    top_k: int,
    vocab_size: int | None = None,
    separator: int | None = None,
) -> list[Targets]:
    """Targets of each block: row t is the teacher's distribution of token t + 1, over the first `vocab_size` ids.

    With a `separator`, the token that ends a document, packed documents do not see each other.
    """
    logits = _logits(model, tokens, vocab_size, separator)
    return [_by_chunks(lambda chunk: top_k_distribution(chunk, top_k), block) for block in logits]


def _logits(
    model: TeacherModel, tokens: Int[Tensor, "B L"], vocab_size: int | None, separator: int | None
) -> Float[Tensor, "B N V"]:
    """Of the first `vocab_size` tokens; of a mixture, the log-probabilities of these."""
    if isinstance(model, Mixture):
        known = model.config.vocab_size
        cut = min(vocab_size or known, known)  # before the softmax: padding takes part in no teacher's distribution
        mixed = (
            _logits(teacher, tokens, cut, separator).float().log_softmax(-1) + math.log(weight)
            for teacher, weight in zip(model.models, model.weights, strict=True)
        )
        return functools.reduce(torch.logaddexp, mixed)
    inputs = document_inputs(tokens.to(model.device), separator)
    return logits_of(model, **inputs)[:, :-1, :vocab_size]


def _by_chunks(distribution: Callable[..., Any], logits: Tensor, *rows: Tensor) -> Any:
    """`distribution` of a block's positions, some at a time, so that temporaries stay small; the result on the CPU."""
    size = _CHUNK_ON_CPU if logits.device.type == "cpu" else _CHUNK
    parts = [distribution(*chunk) for chunk in zip(*(column.split(size) for column in (logits, *rows)), strict=True)]
    return type(parts[0])(*(torch.cat(columns).cpu() for columns in zip(*parts, strict=True)))


def fill(
    model: TeacherModel,
    folder: Path,
    blocks: dict[int, np.ndarray],
    *,
    tokenizer: str,
    corpus_fingerprint: str,
    codec: str = "q16",
    top_k: int | None = None,
    vocab_size: int | None = None,
    seed: int = 42,
    blocks_per_shard: int = 64,
    batch_size: int = 4,
    part: Part = WHOLE,
    separator: int | None = None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> Cache | None:
    """Caches `model`'s distributions of all `blocks` (by id) in `folder` and opens the result; or one `part` of them,
    which `cache.merge` completes.

    `tokenizer` is its hash; `vocab_size` leaves out the padding of the embeddings; `seed` matters to `sampled` only.
    Killed at any moment and called again, it continues after the last whole shard. `on_tokens` hears of progress,
    `say` of a `batch_size` that was halved for memory. Raises `ResourceError` when disk or memory are too small,
    `DataError` when the model's output is not finite or a block is longer than the model's context, `UsageError` when
    another process is at it.
    """
    chosen = codec_for(codec, top_k, vocab_size or int(model.config.get_text_config().vocab_size))
    _require_context(model, blocks)
    made_of = identity(model, tokenizer, corpus_fingerprint, chosen, seed)
    order = sorted(blocks, key=lambda block_id: (len(blocks[block_id]), block_id))
    shards = [order[start : start + blocks_per_shard] for start in range(0, len(order), blocks_per_shard)]
    with Writer.open(folder, made_of, part) as writer:
        missing = {n: ids for n, ids in enumerate(shards) if part.owns(n) and not writer.has(n, ids)}
        num_tokens = sum(len(blocks[block_id]) for ids in missing.values() for block_id in ids)
        files.require_space(folder, num_tokens * chosen.bytes_per_token, "the teacher cache")
        batches = Batches(batch_size, "cache.batch_size", "corpus.seq_len", say)

        def answer(ids: Sequence[int]) -> list[Any]:
            tokens = torch.from_numpy(np.stack([blocks[i] for i in ids]).astype(np.int64))
            return _targets(model, tokens, ids, chosen, seed, separator)

        for number, ids in missing.items():
            targets = []
            for length, equal in itertools.groupby(
                ids, key=lambda block_id: len(blocks[block_id])
            ):  # nothing is padded
                for answered in batches.run(list(equal), answer):
                    targets.extend(answered)
                    on_tokens(length * len(answered))
            writer.add(number, ids, [blocks[i] for i in ids], targets)
        writer.finish()
    return Cache(folder) if part.count == 1 else None


class Online:
    """The teacher without a cache: its distributions are worked out whenever a block is read."""

    def __init__(
        self,
        model: TeacherModel,
        top_k: int | None = None,
        vocab_size: int | None = None,
        separator: int | None = None,
    ):
        self.vocab_size = vocab_size or int(model.config.get_text_config().vocab_size)
        self._top_k = codec_for("q16", top_k, self.vocab_size).top_k  # as a cache would bound it
        self._model, self._separator = model, separator

    def read(self, block_id: int, tokens: np.ndarray) -> Targets:
        """The distributions of one block, as a `Cache` gives them; `block_id` does not matter here."""
        batch = torch.from_numpy(tokens.astype(np.int64))[None]
        return distributions(self._model, batch, self._top_k, self.vocab_size, self._separator)[0]


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
        tokenizer=tokenizer_hash(tokenizer),
        corpus_fingerprint=hashlib.sha256(blocks.numpy().astype("<i4").tobytes()).hexdigest()[:16],
        codec=codec,
        top_k=top_k,
        vocab_size=real_vocab_size(model, tokenizer),
    )
    return Cache(Path(folder))


def _require_context(model: TeacherModel, blocks: dict[int, np.ndarray]) -> None:
    context = _context(model)
    longest = max(blocks, key=lambda block_id: len(blocks[block_id]))
    if context is not None and len(blocks[longest]) > context:
        raise DataError(
            f"block {longest} has {len(blocks[longest])} tokens, the model's context is {context}: lower corpus.seq_len"
        )


def _context(model: TeacherModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
    logits = _logits(model, tokens, codec.vocab_size, separator)
    return [
        _by_chunks(lambda chunk, u: sampled_distribution(chunk, codec.top_k, u), block, _uniforms(seed, i, len(block)))
        for i, block in zip(ids, logits, strict=True)
    ]


def _uniforms(seed: int, block_id: int, count: int) -> Float[Tensor, " N"]:
    """What decides a block's draws: a function of seed and block id alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, block_id]))
    return torch.from_numpy(generator.random(count))
