"""Sources to a corpus: by weight, without evaluation text, split into blocks for training and for validation."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sparsekd.corpus.blocks import Block, Corpus, SourceReport, fingerprint_of
from sparsekd.corpus.guard import Guard, Overlap, by_key, leak
from sparsekd.corpus.packing import choose, one_each, pack
from sparsekd.corpus.texts import documents_of, read_text
from sparsekd.errors import DataError
from sparsekd.recipe import Corpus as CorpusRecipe
from sparsekd.recipe import Source, Text

_VALIDATION_EVERY = 10  # one document in ten is for validation; of a source with fewer, the last tenth of each


def build(
    recipe: CorpusRecipe, texts: dict[str, Text], tokenizer: Any, seed: int, tasks: Mapping[str, str] | None = None
) -> Corpus:
    """Reads the sources, keeps evaluation text out, that of `texts` and of `tasks` by name, and cuts the rest into
    blocks.

    Raises `DataError` for a missing, empty or unreadable source, for one shorter than a block and, where
    `recipe.overlap` is "stop", for evaluation text in the sources, once all of them are read.
    """
    evaluation = {name: read_text(text, recipe) for name, text in texts.items()}
    guard = Guard(by_key(evaluation, tasks or {}))
    overlaps: list[tuple[str, str, Overlap]] = []  # source, document
    total_weight = sum(source.weight for source in recipe.sources.values())
    blocks: list[Block] = []
    train: list[int] = []
    validation: list[int] = []
    reports = {}
    for number, (name, source) in enumerate(recipe.sources.items()):
        share = source.weight / total_weight
        wanted = max(1, round(recipe.num_blocks * share))
        wanted_validation = max(1, round(recipe.num_validation_blocks * share))
        report = reports[name] = SourceReport()
        rng = np.random.Generator(np.random.Philox(key=[seed, 1_000_000 + number]))
        documents = _kept(name, source, recipe, guard, report, overlaps)
        learned, held = _split_blocks(name, documents, tokenizer, recipe, wanted, wanted_validation, rng)
        if overlaps and recipe.overlap == "stop":
            continue  # this will not become a corpus, but the next sources may hold evaluation text too
        if not learned:
            raise DataError(
                f"corpus.sources.{name}: not enough text for one block of {recipe.seq_len} tokens and a validation "
                f"block ({report.documents} documents, {report.dropped_documents} dropped by the leak guard): "
                "give it more text or a smaller corpus.seq_len"
            )
        report.blocks, report.drawn = len(learned), wanted
        first = len(blocks)
        blocks.extend(learned)
        train.extend(first + i % len(learned) for i in range(wanted))
        validation.extend(range(len(blocks), len(blocks) + len(held)))
        blocks.extend(held)
    if overlaps and recipe.overlap == "stop":
        counts = {name: report.documents for name, report in reports.items()}
        way_out = "corpus.overlap=drop leaves those documents out"
        raise leak(overlaps, counts, way_out)
    separator = _separator(tokenizer) if recipe.document_mask else None
    corpus = Corpus(blocks, np.array(train), np.array(validation), evaluation, "", reports, separator)
    corpus.fingerprint = fingerprint_of(corpus)
    return corpus


def _separator(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("corpus.document_mask: the tokenizer has no end-of-text token to tell documents apart by")
    return tokenizer.eos_token_id


def _kept(
    name: str,
    source: Source,
    recipe: CorpusRecipe,
    guard: Guard,
    report: SourceReport,
    overlaps: list[tuple[str, str, Overlap]],
) -> Iterator[tuple[str, str]]:
    """The documents without evaluation text; the others are counted and noted in `overlaps`."""
    for identifier, text in documents_of(name, source, recipe):
        report.documents += 1
        overlap = guard.overlap(text)
        if overlap is None:
            yield identifier, text
        else:
            report.leaked_sequences += overlap.sequences
            report.dropped_documents += 1
            overlaps.append((name, identifier, overlap))


def _split_blocks(
    name: str,
    documents: Iterator[tuple[str, str]],
    tokenizer: Any,
    recipe: CorpusRecipe,
    wanted: int,
    wanted_validation: int,
    rng: np.random.Generator,
) -> tuple[list[Block], list[Block]]:
    """Training and validation blocks, each a random choice of what the source offers: from different documents, or of
    a source of few, which may be books, from different parts of them."""
    for_validation: list[tuple[str, str]] = []
    first = list(itertools.islice(documents, _VALIDATION_EVERY))
    splits_documents = recipe.pack and len(first) < _VALIDATION_EVERY

    def for_training() -> Iterator[tuple[str, str]]:
        for number, (identifier, text) in enumerate(itertools.chain(first, documents)):
            if splits_documents:
                end = _last_tenth(text)
                for_validation.append((identifier, text[end:]))
                yield identifier, text[:end]
            elif number % _VALIDATION_EVERY == 0:
                for_validation.append((identifier, text))
            else:
                yield identifier, text

    cut = functools.partial(pack, keep_apart=recipe.document_mask) if recipe.pack else one_each
    learned = choose(cut(name, for_training(), tokenizer, recipe.seq_len), wanted, rng)
    held = choose(cut(name, iter(for_validation), tokenizer, recipe.seq_len), wanted_validation, rng)
    if not held and len(learned) > 1:  # what is for validation fills no block: give up training blocks instead
        count = min(wanted_validation, len(learned) - 1)
        learned, held = learned[:-count], learned[-count:]
    return (learned, held) if held else ([], [])


def _last_tenth(text: str) -> int:
    """Where the last tenth of a text begins, at the next white space."""
    start = len(text) - len(text) // _VALIDATION_EVERY
    return next((match.start() for match in re.compile(r"\s").finditer(text, start)), len(text))
