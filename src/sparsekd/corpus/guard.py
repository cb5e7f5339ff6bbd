"""The leak guard: training text must not share a sequence of 13 words with evaluation text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sparsekd.errors import DataError

GUARD_WORDS = 13  # length of the word sequences that training text must not share with evaluation text
GUARDED = "guarded.json"  # beside a saved corpus: what the leak guard has seen, by its place in the recipe
_SHOWN_WORDS, _SHOWN_DOCUMENTS = 20, 3  # of evaluation text found in a source: what the error shows


class Overlap(NamedTuple):
    """What a document shares with evaluation text."""

    text: str  # name of the evaluation text
    passage: str  # the longest run of words that both have, cut to 20
    sequences: int  # of 13 words that both have


class Guard:
    """The 13-word sequences of all evaluation texts, given by name; case and punctuation aside."""

    def __init__(self, texts: Mapping[str, str]):
        self._names = {sequence: name for name, text in texts.items() for sequence in _sequences(_words(text))}

    def overlap(self, document: str) -> Overlap | None:
        """What the document shares; of several evaluation texts, the one with the longest run is named."""
        if not self._names:
            return None
        words = _words(document)
        names = [self._names.get(sequence) for sequence in _sequences(words)]
        grouped = itertools.groupby(range(len(names)), names.__getitem__)
        runs = [(name, list(run)) for name, run in grouped if name is not None]
        if not runs:
            return None
        name, longest = max(runs, key=lambda run: len(run[1]))
        shared = words[longest[0] : longest[-1] + GUARD_WORDS]
        passage = " ".join(shared[:_SHOWN_WORDS]) + (" ..." if len(shared) > _SHOWN_WORDS else "")
        return Overlap(name, passage, sum(len(run) for _, run in runs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sequences(words: list[str]) -> Iterator[str]:
    return (" ".join(words[i : i + GUARD_WORDS]) for i in range(len(words) - GUARD_WORDS + 1))


def text_key(name: str) -> str:
    """What an evaluation text is called in the recipe."""
    return f"evaluate.texts.{name}"


def task_key(name: str) -> str:
    """What a harness task is called in the recipe."""
    return f"evaluate.tasks.{name}"


def by_key(texts: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    """Texts and the content of tasks, by what the recipe calls them."""
    return {text_key(name): text for name, text in texts.items()} | {task_key(n): text for n, text in tasks.items()}


def leak(overlaps: list[tuple[str, str, Overlap]], counts: Mapping[str, int], way_out: str) -> DataError:
    """The error: a line that says all, then a line for each of the first passages of every source and evaluation text;
    `counts` are the documents of each source."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for source, document, overlap in overlaps:
        pairs.setdefault((source, overlap.text), []).append(f'{source}, {document}: "{overlap.passage}"')
    listed = ", ".join(
        f"{len(lines)} of {counts[source]} documents of corpus.sources.{source} ({text})"
        for (source, text), lines in pairs.items()
    )
    shown = [line for lines in pairs.values() for line in lines[:_SHOWN_DOCUMENTS]]
    return DataError(f"evaluation text found in training sources: {listed}; {way_out}", *shown)
