"""What is measured, in the order of what matters first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

STEPS = 16  # tokens that are decoded after a prompt
OWN = "own"  # a number format or attention that the runtime does not let choose


class Variant(NamedTuple):
    """How a model runs."""

    runtime: str
    dtype: str
    attention: str

    def __str__(self) -> str:
        return " ".join(word for word in self if word != OWN)


class Shape(NamedTuple):
    """Prompts at once, and tokens of each."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


_FIRST = (Shape(1, 128), Shape(16, 128))  # decoding for one reader; the batch from which arithmetic decides
Group = tuple[Variant, list[Shape]]


def in_order(variants: Sequence[Variant], batches: Sequence[int], lengths: Sequence[int]) -> list[Group]:
    """Shapes by variant: first 1 x 128 and 16 x 128 (or else the two smallest shapes) in every variant, those that
    differ least from the first one before the others; then the other shapes, small ones first."""
    base = variants[0]
    variants = sorted(dict.fromkeys(variants), key=lambda one: _differences(one, base))
    shapes = sorted({Shape(*one) for one in itertools.product(batches, lengths)}, key=_size)
    first = [shape for shape in shapes if shape in _FIRST] or shapes[:2]
    rest = [shape for shape in shapes if shape not in first]
    if len(variants) == 1:
        return [(base, first + rest)]
    return [(variant, part) for part in (first, rest) if part for variant in variants]


def _differences(one: Variant, base: Variant) -> int:
    return sum(mine not in (its, OWN) for mine, its in zip(one, base, strict=True))


def _size(shape: Shape) -> tuple[int, int]:
    return shape.batch * shape.length, shape.batch
