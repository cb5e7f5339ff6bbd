"""What a corpus is: blocks of token ids, which of them training sees, and an order that is a pure function.

A block is `seq_len` token ids of one source, begun by what the tokenizer by default puts before a text (Gemma's and
Llama's beginning-of-sequence token; nothing for many others). What training sees is a list of block ids with repeats
(a source smaller than its share repeats), and `order(seed, epoch)` shuffles that list, so block i of an epoch depends
on nothing but (seed, epoch, i).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    tokens: np.ndarray  # int32
    source: str
    documents: list[str]


class Share(NamedTuple):
    """Part `number` (from 1) of the `count` parts that blocks are divided into: by the rounds that train on them, or by
    the processes that cache them together."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Share()


@dataclass
class SourceReport:
    """What became of one source."""

    documents: int = 0
    blocks: int = 0  # distinct training blocks
    drawn: int = 0  # training blocks in one epoch, repeats included
    leaked_sequences: int = 0  # 13-word sequences shared with evaluation text
    dropped_documents: int = 0  # documents dropped because of them


@dataclass
class Corpus:
    """Blocks by id, and which of them are for training and for validation."""

    blocks: list[Block]
    train_ids: np.ndarray  # int64, with repeats
    validation_ids: np.ndarray
    texts: dict[str, str]  # evaluation texts by name
    fingerprint: str  # of all but the texts
    reports: dict[str, SourceReport] = field(default_factory=dict)
    separator: int | None = None  # the token that ends a document which the next one must not see; None: it may

    def tokens(self, ids: Iterable[int]) -> list[np.ndarray]:
        return [self.blocks[i].tokens for i in ids]

    def order(self, seed: int, epoch: int, share: Share = ALL) -> np.ndarray:
        """Block ids of an epoch in training order: a permutation of `train_ids`, or of a share of them, that (seed,
        epoch) decides. The shares of a seed are apart, whatever the epoch."""
        if share == ALL:
            return shuffled(self.train_ids, seed, epoch)
        parts = np.array_split(shuffled(self.train_ids, seed, 0), share.count)
        return shuffled(parts[share.number - 1], seed, epoch)

    @property
    def num_tokens(self) -> int:
        """Tokens that training sees in one epoch."""
        return sum(len(self.blocks[i].tokens) for i in self.train_ids)


def shuffled(ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `ids` that (seed, epoch) decides."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(ids)


def fingerprint_of(corpus: Corpus) -> str:
    """Of the blocks and of which are for what; the texts are not in it."""
    digest = hashlib.sha256()
    for block in corpus.blocks:
        digest.update(f"{block.source} {len(block.tokens)};".encode())
        digest.update(np.ascontiguousarray(block.tokens, "<i4").data)
    digest.update(np.ascontiguousarray(corpus.train_ids, "<i8").data)
    digest.update(np.ascontiguousarray(corpus.validation_ids, "<i8").data)
    if corpus.separator is not None:
        digest.update(f"separator {corpus.separator}".encode())
    return digest.hexdigest()[:16]
