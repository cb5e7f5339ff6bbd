"""A corpus of one text, with two evaluation texts."""

from pathlib import Path
from typing import Any

import pytest
from corpora import recipe

from sparsekd.corpus import Corpus, build
from sparsekd.recipe import Source, Text


@pytest.fixture
def built(text_file: Path, tokenizer: Any) -> Corpus:
    (text_file.parent / "other.txt").write_text("An evaluation text,\r\nwith é and both kinds of line ends.\n")
    learn = Source(path=text_file.name, holdout=0.2)
    texts = {"other": Text(path="other.txt"), "held": Text(holdout_of="learn")}
    return build(recipe(text_file.parent, learn=learn), texts, tokenizer, seed=1)
