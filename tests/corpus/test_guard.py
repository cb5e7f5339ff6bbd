"""The leak guard: what is kept out, and what it says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import SENTENCE, documents, recipe
from hypothesis import given
from hypothesis import strategies as st
from tiny import paragraphs

from sparsekd.corpus import build
from sparsekd.corpus.guard import Guard, Overlap
from sparsekd.errors import DataError
from sparsekd.recipe import Source, Text


@pytest.mark.parametrize(("words", "dropped"), [(13, 1), (12, 0)])
def test_thirteen_words_of_an_evaluation_text_drop_a_document(
    words: int, dropped: int, tmp_path: Path, tokenizer: Any
) -> None:
    learn = paragraphs(60, seed=1)
    learn[5] += " " + ", ".join(SENTENCE[:words]).upper() + "!"  # case and punctuation aside
    (tmp_path / "learn.txt").write_text("\n\n".join(learn))
    (tmp_path / "test.txt").write_text("Before it. " + " ".join(SENTENCE) + " after it.")
    wanted = recipe(tmp_path, num_blocks=1000, num_validation_blocks=100, overlap="drop")
    built = build(wanted, {"test": Text(path="test.txt")}, tokenizer, seed=1)
    report = built.reports["learn"]
    assert (report.dropped_documents, report.leaked_sequences, report.documents) == (dropped, dropped, 60)
    used = documents(built, np.arange(len(built.blocks)))
    assert ("learn.txt:5" in used) is not bool(dropped)


def test_the_guard_counts_sequences_and_shows_the_longest_run() -> None:
    other = [f"other{number}" for number in range(30)]
    guard = Guard({"steps": " ".join([*SENTENCE, "step14"]), "short": "short", "others": " ".join(other)})
    assert guard.overlap(" ".join(SENTENCE)) == Overlap("steps", " ".join(SENTENCE), 1)
    fourteen = [*SENTENCE, "step14"]
    assert guard.overlap("zero " + "; ".join(fourteen).title() + " more") == Overlap("steps", " ".join(fourteen), 2)
    both = guard.overlap(" ".join([*fourteen, "between", *other[5:]]))
    assert both == Overlap("others", " ".join(other[5:25]) + " ...", 2 + 13)
    for nothing in (" ".join(reversed(SENTENCE)), " ".join(SENTENCE[:12]), "", "short"):
        assert guard.overlap(nothing) is None
    assert Guard({}).overlap(" ".join(SENTENCE)) is None


@given(before=st.integers(0, 30), shared=st.integers(0, 40), after=st.integers(0, 30))
def test_a_run_of_shared_words_is_found_wherever_it_stands(before: int, shared: int, after: int) -> None:
    passage = [f"shared{number}" for number in range(shared)]
    text = " ".join([*("a" * n for n in range(1, 20)), *passage, "z"])
    found = Guard({"test": text}).overlap(" ".join(["before"] * before + passage + ["after"] * after))
    if shared < 13:
        assert found is None
    else:
        assert found is not None
        assert found.sequences == shared - 12
        assert found.passage.split() == passage[:20] + ["..."] * (shared > 20)


def test_evaluation_text_in_sources_stops_with_the_passages_of_all(tmp_path: Path, tokenizer: Any) -> None:
    """Also of a source that holds nothing else, and of those after it; the fourth document is only counted."""
    learn, copied = paragraphs(60, seed=1), paragraphs(20, seed=3)
    for number in (3, 10, 20, 59):
        learn[number] = f"Before. {' '.join(SENTENCE).upper()}: after."
    for name, content in {"copied": copied, "learn": learn, "clean": paragraphs(60, seed=2)}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(content))
    (tmp_path / "test.txt").write_text("It says: " + " ".join(SENTENCE))
    wanted = recipe(tmp_path, sources={name: Source(path=f"{name}.txt") for name in ("copied", "clean", "learn")})
    texts = {"test": Text(path="test.txt"), "copy": Text(path="copied.txt")}
    with pytest.raises(DataError) as caught:
        build(wanted, texts, tokenizer, seed=1)
    first, *shown = str(caught.value).split("\n")
    assert first == (
        "evaluation text found in training sources: 20 of 20 documents of corpus.sources.copied (evaluate.texts.copy), "
        "4 of 60 documents of corpus.sources.learn (evaluate.texts.test); corpus.overlap=drop leaves those documents "
        "out"
    )
    assert len(shown) == 6
    for number, line in enumerate(shown[:3]):
        words = re.findall(r"\w+", copied[number].lower())[:20]
        assert line in (f'  copied, copied.txt:{number}: "{" ".join(words)}{end}"' for end in ("", " ..."))
    assert shown[3:] == [f'  learn, learn.txt:{number}: "{" ".join(SENTENCE)}"' for number in (3, 10, 20)]


def test_a_source_of_nothing_but_evaluation_text_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text("\n\n".join(paragraphs(20, seed=1)))
    with pytest.raises(DataError, match=r"corpus\.sources\.learn: .*20 documents, 20 dropped by the leak guard"):
        build(recipe(tmp_path, overlap="drop"), {"test": Text(path="learn.txt")}, tokenizer, seed=1)
