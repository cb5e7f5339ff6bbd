"""What an outcome is called, and which of them a program may not have.

    named      an error for the user: exit code 2 to 5 and one line that says where
    harmless   all results are those of the untouched run, to the last bit
    remade     the program made a stage again, and its results are the same; times differ
    accepted   an input that is still valid, or was one by chance
    usage      the argument parser's own page, exit code 2

and what may not be:

    silent     a result differs, and nothing was said
    traceback  an exception that is no error for the user, or a dead process
    slow       more than 10 s, once more after a first such time, for the machine may be busy
    large      more than 1 GB of memory above what there was
    unclear    an error of another exit code, of several lines, of an endless line, or one that names no place
"""

from __future__ import annotations

import re

from children import Call

SILENT, TRACEBACK, SLOW, LARGE, UNCLEAR = "silent", "traceback", "slow", "large", "unclear"
NAMED, HARMLESS, REMADE, ACCEPTED, USAGE = "named", "harmless", "remade", "accepted", "usage"
WORST_FIRST = (TRACEBACK, SILENT, SLOW, LARGE, UNCLEAR, NAMED, REMADE, USAGE, ACCEPTED, HARMLESS)
BAD = WORST_FIRST[: WORST_FIRST.index(NAMED)]

LONGEST_S, MOST_BYTES = 10.0, 10**9
_LONGEST_LINE = 1500
_LEAK_GUARD = "evaluation text found in training sources"  # the one message with lines below it: the passages


def of_failure(call: Call, places: list[str]) -> tuple[str, str]:
    """Verdict and reason for a call that did not end well; its message must have one of `places` in it, if given."""
    if call.crash:
        return TRACEBACK, call.crash
    lines = call.err.rstrip("\n").split("\n")
    if call.code == 2 and lines[0].startswith("Usage: "):
        return USAGE, ""
    first = next((number for number, line in enumerate(lines) if line.startswith("sparsekd: ")), None)
    if first is None:
        return UNCLEAR, f"exit code {call.code} without a message: {call.err[-300:]}"
    message, below = lines[first], lines[first + 1 :]
    if call.code not in (2, 3, 4, 5):
        return UNCLEAR, f"exit code {call.code}: {message[:300]}"
    passages = _LEAK_GUARD in message and all(line.startswith("  ") for line in below)
    if (below and not passages) or re.search(r"[\r\x00-\x08\x0b-\x1f\x7f]", message):
        return UNCLEAR, f"more than one plain line: {message[:150]!r} {below[:2]}"
    if len(message) > _LONGEST_LINE:
        return UNCLEAR, f"{len(message)} characters: {message[:150]}"
    if places and not any(place in message for place in places):
        return UNCLEAR, f"names none of {', '.join(places)}: {message[:300]}"
    return NAMED, message[:300]


def of_cost(call: Call, longest_s: float = LONGEST_S) -> tuple[str, str] | None:
    """Slow or large, whatever else it is."""
    if call.seconds > longest_s:
        return SLOW, f"{call.seconds:.1f} s"
    if call.memory_bytes > MOST_BYTES:
        return LARGE, f"{call.memory_bytes / 1e9:.1f} GB"
    return None


def worst(verdicts: list[str]) -> str:
    return min(verdicts, key=WORST_FIRST.index)
