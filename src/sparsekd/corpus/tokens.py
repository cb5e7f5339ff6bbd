"""Text to token ids, of plain text and in bounded memory.

For each token a tokenizer holds hundreds of bytes, and a word of megabytes makes some give up. So a long text is cut
into pieces that are tokenised one by one, at places where that makes no difference: where the tokens of both sides
together are those of each side alone. A book of 3 MB takes 80 MB then instead of 430.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

_PIECE = 2**18  # characters that are tokenised at a time
_NEAR = 2**10  # characters among which a place between two words is looked for
_CLOSE = 2**6  # the same for a place anywhere, and what of both sides is looked at


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: no special token is added, and one that is spelled out in the text stays text."""
    return list(itertools.chain.from_iterable(encode_pieces(tokenizer, text)))


def encode_pieces(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """The same ids, those of one piece of the text after another."""
    start = 0
    while start < len(text):
        end, resumed = _cut(tokenizer, text, start + _PIECE)
        yield _ids(tokenizer, text[start:end])
        start = resumed


def beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer by default puts before a text, such as a beginning-of-sequence token: models that were trained
    with one are lost without it. Most often nothing."""
    plain, default = encode(tokenizer, "a"), tokenizer("a").input_ids
    starts = (start for start in range(len(default)) if default[start : start + len(plain)] == plain)
    return default[: next(starts, 0)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def _cut(tokenizer: Any, text: str, wanted: int) -> tuple[int, int]:
    """Where a piece ends, near `wanted`, and where the next one begins: there, or after a space, which tokenizers such
    as Llama's put before every text themselves. Where every place near makes a difference it is `wanted`."""
    if wanted >= len(text):
        return len(text), len(text)
    near = range(wanted, wanted - _NEAR, -1)
    between_words = (end for end in near if text[end].isspace() != text[end - 1].isspace())
    for end in itertools.chain(between_words, near[:_CLOSE]):
        left, right = text[end - _CLOSE : end], text[end : end + _CLOSE]
        together = _ids(tokenizer, left + right)
        for resumed in (end, end + 1) if right[0] == " " else (end,):
            if _ids(tokenizer, left) + _ids(tokenizer, text[resumed : end + _CLOSE]) == together:
                return end, resumed
    return wanted, wanted
