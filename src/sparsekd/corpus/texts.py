"""The documents of a source, those for training and those held out, and evaluation texts made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sparsekd.corpus import sources
from sparsekd.corpus.guard import Guard, by_key, leak
from sparsekd.corpus.storing import load, save_texts
from sparsekd.errors import DataError
from sparsekd.recipe import Corpus as CorpusRecipe
from sparsekd.recipe import Source, Text


def documents_of(name: str, source: Source, recipe: CorpusRecipe, held_out: bool = False) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents for training, or of the last ones that are held out for evaluation."""
    documents = sources.read(source, recipe.root)
    if source.holdout:
        listed = list(documents)
        cut = len(listed) - round(len(listed) * source.holdout)
        if cut == len(listed) or cut == 0:
            raise DataError(
                f"corpus.sources.{name}: {len(listed)} documents are too few for a holdout of {source.holdout}: "
                "give it more; in a .txt, `split` says what stands between two"
            )
        documents = iter(listed[cut:] if held_out else listed[:cut])
    return documents


def read_text(text: Text, recipe: CorpusRecipe) -> str:
    """An evaluation text as one string: documents are joined by an empty line."""
    if text.holdout_of is not None:
        source = recipe.sources[text.holdout_of]
        held = documents_of(text.holdout_of, source, recipe, held_out=True)
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


def add_texts(folder: Path, recipe: CorpusRecipe, texts: Mapping[str, str], tasks: Mapping[str, str]) -> None:
    """Adds evaluation texts to a saved corpus of `recipe`, if the documents of its blocks share no sequence of words
    with them or with what `tasks` ask; raises `DataError` naming the documents that do, and leaves the corpus as it
    was."""
    corpus = load(folder)
    guard = Guard(by_key(texts, tasks))
    overlaps, counts = [], {}
    for name, source in recipe.sources.items():
        learned = {identifier for block in corpus.blocks if block.source == name for identifier in block.documents}
        counts[name] = len(learned)
        for identifier, text in documents_of(name, source, recipe):
            overlap = guard.overlap(text) if identifier in learned else None
            if overlap is not None:
                overlaps.append((name, identifier, overlap))
            learned.discard(identifier)
            if not learned:  # a stream is read no further
                break
    if overlaps:
        way_out = "make the corpus again with --fresh, where corpus.overlap=drop leaves such documents out"
        raise leak(overlaps, counts, way_out)
    save_texts(replace(corpus, texts=corpus.texts | dict(texts)), folder)
