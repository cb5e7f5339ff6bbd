"""Documents to blocks: packed one after the other or one block for each, and a random choice of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sparsekd.corpus.blocks import Block
from sparsekd.corpus.tokens import beginning, encode_pieces
from sparsekd.errors import DataError

_SHUFFLE_BUFFER = 10_000  # blocks held to mix a source; a smaller source is mixed whole


def blocks_from_texts(texts: Iterable[str], tokenizer: Any, seq_len: int = 256) -> np.ndarray:
    """Packs texts into an int64 array of shape (number of whole blocks, seq_len); the simple way in for a library user.

    Raises `DataError` when the texts are shorter than one block.
    """
    packed = [block.tokens for block in pack("texts", ((str(i), t) for i, t in enumerate(texts)), tokenizer, seq_len)]
    if not packed:
        raise DataError(f"the texts are shorter than one block of {seq_len} tokens: give more, or a smaller seq_len")
    return np.stack(packed).astype(np.int64)


def pack(
    name: str, documents: Iterator[tuple[str, str]], tokenizer: Any, seq_len: int, keep_apart: bool = False
) -> Iterator[Block]:
    """Joins documents, an end-of-text token between them, and cuts the stream into whole blocks. Each block begins as
    the tokenizer begins a text, and where documents are kept apart each document does."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    begin = beginning(tokenizer)
    tokens: list[int] = []
    identifiers: list[str] = []
    for identifier, text in documents:
        identifiers.append(identifier)
        for some in itertools.chain([begin if keep_apart else []], encode_pieces(tokenizer, text), [separator]):
            tokens.extend(some)
            start = 0
            while True:
                begun = tokens[start : start + len(begin)] == begin
                end = start + seq_len - (0 if begun else len(begin))
                if end > len(tokens):
                    break
                block = ([] if begun else begin) + tokens[start:end]
                yield Block(np.array(block, np.int32), name, identifiers)
                start = end
                identifiers = [identifier]
            del tokens[:start]
        if not tokens:
            identifiers = []


def one_each(name: str, documents: Iterator[tuple[str, str]], tokenizer: Any, seq_len: int) -> Iterator[Block]:
    """A block for each document, cut at `seq_len`; documents of fewer than 8 tokens teach nothing and are skipped."""
    begin = beginning(tokenizer)
    for identifier, text in documents:
        of_text = itertools.chain.from_iterable(encode_pieces(tokenizer, text))
        tokens = list(itertools.islice(itertools.chain(begin, of_text), seq_len))
        if len(tokens) >= 8:
            yield Block(np.array(tokens, np.int32), name, [identifier])


def choose(blocks: Iterator[Block], count: int, rng: np.random.Generator) -> list[Block]:
    """`count` blocks drawn at random through a buffer, so that an endless source is read only as far as needed."""
    chosen: list[Block] = []
    buffer: list[Block] = []
    for block in blocks:
        buffer.append(block)
        if len(buffer) > _SHUFFLE_BUFFER:
            chosen.append(buffer.pop(int(rng.integers(len(buffer)))))
            if len(chosen) == count:
                return chosen
    picks = rng.permutation(len(buffer))[: count - len(chosen)]
    return chosen + [buffer[i] for i in picks]
