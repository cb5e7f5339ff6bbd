"""What a field of a recipe may hold, said beside its type."""

from __future__ import annotations

import math
import operator
import re

# of a key that changes no result beyond rounding, or names what is known by its content: no input of any stage
PASSING = {"passing": True}

_BOUND = re.compile(r"(>=|>) (\S+)")
_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")
_INCLUSIVE = re.compile(r"(\S+) to (\S+)")


class Range:
    """The finite numbers from one to another, in the words that an error message uses: `>= 1`, `> 0`, `(0, 0.95]`,
    `1 to 256`. Used as `Annotated[int, Range(">= 1")]`."""

    def __init__(self, text: str):
        self.text, self._tests = text, []
        if found := _BOUND.fullmatch(text):
            self._tests = [(operator.ge if found[1] == ">=" else operator.gt, float(found[2]))]
        elif found := _INTERVAL.fullmatch(text):
            lower, upper = float(found[2]), float(found[3])
            self._tests = [
                (operator.ge if found[1] == "[" else operator.gt, lower),
                (operator.le if found[4] == "]" else operator.lt, upper),
            ]
        elif found := _INCLUSIVE.fullmatch(text):
            self._tests = [(operator.ge, float(found[1])), (operator.le, float(found[2]))]
        else:
            raise AssertionError(f"{text!r} is no range")

    def __contains__(self, value: int | float) -> bool:
        return math.isfinite(value) and all(test(value, bound) for test, bound in self._tests)
