"""Text to token blocks: sources with weights, a leak guard, and an order that is a pure function.

A block is `seq_len` token ids of one source, begun by what the tokenizer by default puts before a text (Gemma's and
Llama's beginning-of-sequence token; nothing for many others). Blocks are stored once, in `blocks.parquet`, with the ids
of the documents they come from; `manifest.json` is written last and holds their fingerprint. What training sees is a
list of block ids with repeats (a source smaller than its share repeats), and `order(seed, epoch)` shuffles that list,
so block i of an epoch depends on nothing but (seed, epoch, i).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd import files, records, sources
from sparsekd.errors import DataError
from sparsekd.recipe import Corpus as CorpusRecipe
from sparsekd.recipe import Source, Text, check_text_name
from sparsekd.tokens import beginning, encode_pieces

GUARD_WORDS = 13  # length of the word sequences that training text must not share with evaluation text
GUARDED = "guarded.json"  # beside a saved corpus: what the leak guard has seen, by its place in the recipe
_SHOWN_WORDS, _SHOWN_DOCUMENTS = 20, 3  # of evaluation text found in a source: what the error shows
_SHUFFLE_BUFFER = 10_000  # blocks held to mix a source; a smaller source is mixed whole
_VALIDATION_EVERY = 10  # one document in ten is for validation; of a source with fewer, the last tenth of each


class Block(NamedTuple):
    tokens: np.ndarray  # int32
    source: str
    documents: list[str]


class Share(NamedTuple):
    """Part `number` (from 1) of the `count` parts that rounds divide the training blocks into."""

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


def build(
    recipe: CorpusRecipe, texts: dict[str, Text], tokenizer: Any, seed: int, tasks: Mapping[str, str] | None = None
) -> Corpus:
    """Reads the sources, keeps evaluation text out, that of `texts` and of `tasks` by name, and cuts the rest into
    blocks.

    Raises `DataError` for a missing, empty or unreadable source, for one shorter than a block and, where
    `recipe.overlap` is "stop", for evaluation text in the sources, once all of them are read.
    """
    evaluation = {name: read_text(text, recipe) for name, text in texts.items()}
    guard = Guard(_by_key(evaluation, tasks or {}))
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
        raise DataError(*_describe(overlaps, counts, way_out))
    separator = _separator(tokenizer) if recipe.document_mask else None
    corpus = Corpus(blocks, np.array(train), np.array(validation), evaluation, "", reports, separator)
    corpus.fingerprint = _fingerprint(corpus)
    return corpus


def _separator(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("corpus.document_mask: the tokenizer has no end-of-text token to tell documents apart by")
    return tokenizer.eos_token_id


def blocks_from_texts(texts: Iterable[str], tokenizer: Any, seq_len: int = 256) -> np.ndarray:
    """Packs texts into an int64 array of shape (number of whole blocks, seq_len); the simple way in for a library user.

    Raises `DataError` when the texts are shorter than one block.
    """
    packed = [block.tokens for block in _pack("texts", ((str(i), t) for i, t in enumerate(texts)), tokenizer, seq_len)]
    if not packed:
        raise DataError(f"the texts are shorter than one block of {seq_len} tokens")
    return np.stack(packed).astype(np.int64)


# ---- evaluation text and the leak guard


def read_text(text: Text, recipe: CorpusRecipe) -> str:
    """An evaluation text as one string: documents are joined by an empty line."""
    if text.holdout_of is not None:
        source = recipe.sources[text.holdout_of]
        held = _documents(text.holdout_of, source, recipe, held_out=True)
        return "\n\n".join(document for _, document in held)
    assert text.path is not None
    path = sources.resolve(text.path, recipe.root)
    if path.suffix != ".txt":
        rows = sources.read(Source(path=text.path, text=text.text), recipe.root)
        return "\n\n".join(document for _, document in rows)
    content = sources.read_txt(path)
    if text.rows_joined_by is None:
        return content
    rows = content.split("\n")[:-1] if content.endswith("\n") else content.split("\n")
    # as the Hub's WikiText rows are: a line keeps its newline, a blank one is empty
    return text.rows_joined_by.join(row + "\n" if row.strip() else "" for row in rows)


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


def _by_key(texts: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    return {text_key(name): text for name, text in texts.items()} | {task_key(n): text for n, text in tasks.items()}


def _describe(overlaps: list[tuple[str, str, Overlap]], counts: Mapping[str, int], way_out: str) -> list[str]:
    """A line that says all, then a line for each of the first passages of every source and evaluation text; `counts`
    are the documents of each source."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for source, document, overlap in overlaps:
        pairs.setdefault((source, overlap.text), []).append(f'{source}, {document}: "{overlap.passage}"')
    listed = ", ".join(
        f"{len(lines)} of {counts[source]} documents of corpus.sources.{source} ({text})"
        for (source, text), lines in pairs.items()
    )
    shown = [line for lines in pairs.values() for line in lines[:_SHOWN_DOCUMENTS]]
    return [f"evaluation text found in training sources: {listed}; {way_out}", *shown]


def add_texts(folder: Path, recipe: CorpusRecipe, texts: Mapping[str, str], tasks: Mapping[str, str]) -> None:
    """Adds evaluation texts to a saved corpus of `recipe`, if the documents of its blocks share no sequence of words
    with them or with what `tasks` ask; raises `DataError` naming the documents that do, and leaves the corpus as it
    was."""
    corpus = load(folder)
    guard = Guard(_by_key(texts, tasks))
    overlaps, counts = [], {}
    for name, source in recipe.sources.items():
        learned = {identifier for block in corpus.blocks if block.source == name for identifier in block.documents}
        counts[name] = len(learned)
        for identifier, text in _documents(name, source, recipe):
            overlap = guard.overlap(text) if identifier in learned else None
            if overlap is not None:
                overlaps.append((name, identifier, overlap))
            learned.discard(identifier)
            if not learned:  # a stream is read no further
                break
    if overlaps:
        way_out = "make the corpus again with --fresh, where corpus.overlap=drop leaves such documents out"
        raise DataError(*_describe(overlaps, counts, way_out))
    _save_texts(replace(corpus, texts=corpus.texts | dict(texts)), folder)


# ---- documents to blocks


def _documents(name: str, source: Source, recipe: CorpusRecipe, held_out: bool = False) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents for training, or of the last ones that are held out for evaluation."""
    documents = sources.read(source, recipe.root)
    if source.holdout:
        listed = list(documents)
        cut = len(listed) - round(len(listed) * source.holdout)
        if cut == len(listed) or cut == 0:
            raise DataError(
                f"corpus.sources.{name}: {len(listed)} documents are too few for a holdout of {source.holdout}"
            )
        documents = iter(listed[cut:] if held_out else listed[:cut])
    return documents


def _kept(
    name: str,
    source: Source,
    recipe: CorpusRecipe,
    guard: Guard,
    report: SourceReport,
    overlaps: list[tuple[str, str, Overlap]],
) -> Iterator[tuple[str, str]]:
    """The documents without evaluation text; the others are counted and noted in `overlaps`."""
    for identifier, text in _documents(name, source, recipe):
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

    cut = functools.partial(_pack, keep_apart=recipe.document_mask) if recipe.pack else _one_each
    learned = _choose(cut(name, for_training(), tokenizer, recipe.seq_len), wanted, rng)
    held = _choose(cut(name, iter(for_validation), tokenizer, recipe.seq_len), wanted_validation, rng)
    if not held and len(learned) > 1:  # what is for validation fills no block: give up training blocks instead
        count = min(wanted_validation, len(learned) - 1)
        learned, held = learned[:-count], learned[-count:]
    return (learned, held) if held else ([], [])


def _last_tenth(text: str) -> int:
    """Where the last tenth of a text begins, at the next white space."""
    start = len(text) - len(text) // _VALIDATION_EVERY
    return next((match.start() for match in re.compile(r"\s").finditer(text, start)), len(text))


def _pack(
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


def _one_each(name: str, documents: Iterator[tuple[str, str]], tokenizer: Any, seq_len: int) -> Iterator[Block]:
    """A block for each document, cut at `seq_len`; documents of fewer than 8 tokens teach nothing and are skipped."""
    begin = beginning(tokenizer)
    for identifier, text in documents:
        of_text = itertools.chain.from_iterable(encode_pieces(tokenizer, text))
        tokens = list(itertools.islice(itertools.chain(begin, of_text), seq_len))
        if len(tokens) >= 8:
            yield Block(np.array(tokens, np.int32), name, [identifier])


def _choose(blocks: Iterator[Block], count: int, rng: np.random.Generator) -> list[Block]:
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


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for block in corpus.blocks:
        digest.update(f"{block.source} {len(block.tokens)};".encode())
        digest.update(np.ascontiguousarray(block.tokens, "<i4").data)
    digest.update(np.ascontiguousarray(corpus.train_ids, "<i8").data)
    digest.update(np.ascontiguousarray(corpus.validation_ids, "<i8").data)
    if corpus.separator is not None:
        digest.update(f"separator {corpus.separator}".encode())
    return digest.hexdigest()[:16]


# ---- on disk


def save(corpus: Corpus, folder: Path) -> None:
    """Writes the corpus; the manifest, last, makes it whole."""
    table = pa.table(
        {
            "block_id": pa.array(range(len(corpus.blocks)), pa.int64()),
            "source": pa.array([block.source for block in corpus.blocks]),
            "documents": pa.array([block.documents for block in corpus.blocks], pa.list_(pa.string())),
            "tokens": pa.array([block.tokens for block in corpus.blocks], pa.list_(pa.int32())),
        }
    )
    with files.atomic_path(folder / "blocks.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    _save_texts(corpus, folder)


def _save_texts(corpus: Corpus, folder: Path) -> None:
    for name, text in corpus.texts.items():
        files.write_text(text_path(folder, name), text)
    manifest = {
        "fingerprint": corpus.fingerprint,
        "train_ids": corpus.train_ids.tolist(),
        "validation_ids": corpus.validation_ids.tolist(),
        "texts": {name: files.sha256(text) for name, text in sorted(corpus.texts.items())},
        "separator": corpus.separator,
        "sources": {name: vars(report) for name, report in corpus.reports.items()},
    }
    records.write(folder / "manifest.json", manifest)


def text_path(folder: Path, name: str) -> Path:
    """Where an evaluation text lies; raises `UsageError` for a name that is not a plain file name."""
    check_text_name(name)
    return folder / f"text-{name}.txt"


def load(folder: Path) -> Corpus:
    """Reads a saved corpus; raises `DataError` when a file is missing or its content is not what was written."""
    manifest = records.read(folder / "manifest.json", way_out=f"remove {folder} to make the corpus again")
    try:
        table = pq.read_table(folder / "blocks.parquet", page_checksum_verification=True)
        rows = zip(*(table[name].to_pylist() for name in ("tokens", "source", "documents")), strict=True)
        blocks = [Block(np.array(tokens, np.int32), source, documents) for tokens, source, documents in rows]
        texts = {name: text_path(folder, name).read_bytes().decode("utf-8") for name in manifest["texts"]}
        reports = {name: SourceReport(**values) for name, values in manifest["sources"].items()}
        train, validation = np.array(manifest["train_ids"]), np.array(manifest["validation_ids"])
        corpus = Corpus(blocks, train, validation, texts, manifest["fingerprint"], reports, manifest["separator"])
        found = _fingerprint(corpus)
        changed = [name for name, text in texts.items() if files.sha256(text) != manifest["texts"][name]]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"corpus {folder} is damaged: {reason}; make it again with --fresh") from error
    if found != corpus.fingerprint:
        raise DataError(f"corpus {folder} is damaged: its content does not match its fingerprint; use --fresh")
    if changed:
        raise DataError(f"{text_path(folder, changed[0])} is damaged: its content is not what was written; use --fresh")
    return corpus
