"""Corpora of the tests: a recipe of one text, and what two corpora have in common."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.corpus import Corpus, build
from sparsekd.errors import DataError
from sparsekd.recipe import Corpus as CorpusRecipe
from sparsekd.recipe import Source

SENTENCE = [f"step{number}" for number in range(1, 14)]  # thirteen words


def recipe(root: Path, *, learn: Source | None = None, **changes: Any) -> CorpusRecipe:
    """A corpus of `learn.txt` alone unless `sources` are given."""
    values = {"seq_len": 32, "num_blocks": 12, "num_validation_blocks": 3, **changes}
    return CorpusRecipe(root=str(root), **{"sources": {"learn": learn or Source(path="learn.txt")}, **values})


def same(a: Corpus, b: Corpus) -> bool:
    return (
        a.fingerprint == b.fingerprint
        and len(a.blocks) == len(b.blocks)
        and all(np.array_equal(x.tokens, y.tokens) and x[1:] == y[1:] for x, y in zip(a.blocks, b.blocks, strict=True))
        and np.array_equal(a.train_ids, b.train_ids)
        and np.array_equal(a.validation_ids, b.validation_ids)
        and (a.texts, a.reports) == (b.texts, b.reports)
    )


def same_training(a: Corpus, b: Corpus) -> bool:
    """Whether everything is the same that training and evaluation read; the names of the documents are for people."""
    nameless = [
        Corpus(
            [block._replace(documents=[]) for block in x.blocks], x.train_ids, x.validation_ids, x.texts, x.fingerprint
        )
        for x in (a, b)
    ]
    return same(*nameless)


def documents(built: Corpus, ids: np.ndarray) -> set[str]:
    return {name for i in ids for name in built.blocks[i].documents}


def refused(root: Path, tokenizer: Any, **changes: Any) -> str:
    """The one line that says why."""
    with pytest.raises(DataError) as caught:
        build(recipe(root, **changes), {}, tokenizer, seed=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)
