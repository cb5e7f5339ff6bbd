"""Where documents come from: kinds of sources, those that cannot be used, and evaluation texts."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import recipe, refused
from tiny import paragraphs

from sparsekd import corpus
from sparsekd.corpus import build, sources
from sparsekd.errors import DataError, UsageError
from sparsekd.recipe import Source, Text

# ---- sources that cannot be used


def test_too_little_text_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text("A few words.\n\nAnd some more.")
    found = refused(tmp_path, tokenizer)
    assert "corpus.sources.learn: not enough text for one block of 32 tokens" in found
    assert "2 documents" in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt: no such file"),
        ("empty.txt", b"", r"empty\.txt: no text in it"),
        ("blank.txt", b"\n\n  \n", r"blank\.txt: no text in it"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), r"latin\.txt: not UTF-8 at byte 3"),
        ("empty.jsonl", b"\n", r"empty\.jsonl: no text in it"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', r"torn\.jsonl:2: not a JSON object"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', r"latin\.jsonl:1: not a JSON object"),
        ("list.jsonl", b'\n["a"]\n', r"list\.jsonl:2: no text column 'text' \(found: list\)"),
        ("number.jsonl", b'{"text": 3}', r"number\.jsonl:1: 'text' is int: expected text"),
        ("not.parquet", b"PAR1 or not", r"not\.parquet: not readable as Parquet"),
        ("empty.parquet", b"", r"empty\.parquet: not readable as Parquet"),
    ],
)
def test_an_unusable_source_is_a_data_error_of_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(tmp_path, tokenizer, learn=Source(path=name)))


def test_text_that_no_encoding_can_hold_is_a_data_error(tmp_path: Path, tokenizer: Any) -> None:
    rows = [json.dumps({"text": text}) for text in paragraphs(20, seed=1)]
    (tmp_path / "half.jsonl").write_text("\n".join([*rows[:3], '{"text": "half a pair: \\ud800"}', *rows[3:]]))
    assert "half.jsonl:4" in refused(tmp_path, tokenizer, learn=Source(path="half.jsonl"))


def test_an_unknown_kind_of_file_and_a_bad_split_are_usage_errors(text_file: Path, tokenizer: Any) -> None:
    (text_file.parent / "learn.csv").write_text("text")
    for source, message in (
        (Source(path="learn.csv"), r"learn\.csv: expected a \.txt, \.jsonl or \.parquet file"),
        (Source(path="learn.txt", split="("), r"split '\(' is not a regular expression"),
    ):
        with pytest.raises(UsageError, match=message):
            build(recipe(text_file.parent, learn=source), {}, tokenizer, seed=1)


def test_too_few_documents_for_a_holdout(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text("\n\n".join(paragraphs(3, seed=1)))
    found = refused(tmp_path, tokenizer, learn=Source(path="learn.txt", holdout=0.1))
    assert "3 documents are too few for a holdout of 0.1" in found


# ---- kinds of sources


def listed(root: Path, source: Source) -> list[tuple[str, str]]:
    return list(sources.read(source, str(root)))


def test_txt_is_split_at_a_regular_expression(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nstill\n\n \n\ntwo\n\n\n", encoding="utf-8")
    assert [text for _, text in listed(tmp_path, Source(path="a.txt"))] == ["one\nstill", "two"]
    (tmp_path / "wiki.txt").write_text(" \n = A = \n x \n = = B = = \n y \n = C = \n z \n", encoding="utf-8")
    split = "\n(?= = [^=])"
    found = listed(tmp_path, Source(path="wiki.txt", split=split))
    assert found == [("wiki.txt:1", " = A = \n x \n = = B = = \n y "), ("wiki.txt:2", " = C = \n z \n")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_txt_is_split_at_empty_lines_whatever_ends_them(end: str, tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"{paragraph[:30]}{end}{paragraph[30:]}" for paragraph in paragraphs(60, seed=1)]
    (tmp_path / "learn.txt").write_bytes(f"{end}{end}".join(texts).encode())
    assert [text for _, text in listed(tmp_path, Source(path="learn.txt"))] == texts
    build(recipe(tmp_path), {}, tokenizer, seed=1)


def test_one_document_of_megabytes_is_a_corpus(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text(" ".join(paragraphs(7000, seed=1)))
    assert (tmp_path / "learn.txt").stat().st_size > 1.8e6
    built = build(recipe(tmp_path), {}, tokenizer, seed=1)
    assert (len(built.train_ids), len(built.validation_ids)) == (12, 3)


def test_a_parquet_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    rows = pa.array([text.encode() for text in paragraphs(300, seed=1)] + [b"caf\xe9"], pa.binary())
    texts = pa.StringArray.from_buffers(len(rows), *rows.buffers()[1:])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 300: not UTF-8 at byte 3"):
        listed(tmp_path, Source(path="a.parquet"))


def test_a_parquet_value_that_is_no_text_is_named_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1: 'text' is NoneType: expected text"):
        listed(tmp_path, Source(path="a.parquet"))


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_parquet_rows_are_unpacked_few_at_a_time(use_dictionary: bool, tmp_path: Path) -> None:
    """A file of a few kilobytes, which would be 4 GB of text at once."""
    big = pa.array(["a" * 40_000_000, "b" * 40_000_000, "c" * 40_000_000])
    indices = pa.array(np.arange(100 if use_dictionary else 20) % 3, pa.int32())
    text = pa.DictionaryArray.from_arrays(indices, big)
    options: Any = {"compression": "zstd", "use_dictionary": use_dictionary, "write_batch_size": 1}
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", **options)
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9,) * 2)\n"
        "from sparsekd.corpus import sources; from sparsekd.recipe import Source\n"
        "print(sum(len(text) for _, text in sources.read(Source(path=sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert done.stdout == f"{len(indices) * 40_000_000}\n", done.stderr


def test_jsonl_by_column_and_by_template(tmp_path: Path) -> None:
    rows = [
        {"question": "Why {answer}?", "answer": "So\u2028it is.", "n": 1},
        {"question": "q", "answer": "a", "n": 2},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    found = listed(tmp_path, Source(path="a.jsonl", text="{question}\n{answer}"))
    assert found == [("a.jsonl:0", "Why {answer}?\nSo\u2028it is."), ("a.jsonl:1", "q\na")]
    assert [text for _, text in listed(tmp_path, Source(path="a.jsonl", text="answer"))] == ["So\u2028it is.", "a"]


@pytest.mark.parametrize("text", ["text", "{question}\n{text}"])
def test_a_wrong_column_is_named_with_the_line_and_the_columns(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t", "question": "q"}\n{"question": "q", "body": "b"}\n')
    with pytest.raises(DataError) as caught:
        listed(tmp_path, Source(path="a.jsonl", text=text))
    assert "a.jsonl:2: no text column 'text' (found: question, body)" in str(caught.value)


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    texts = paragraphs(400, seed=1)  # more than one batch of rows
    pq.write_table(pa.table({"body": texts, "n": range(400)}), tmp_path / "a.parquet")
    assert [text for _, text in listed(tmp_path, Source(path="a.parquet", text="body"))] == texts
    built = build(recipe(tmp_path, learn=Source(path="a.parquet", text="body")), {}, tokenizer, seed=1)
    assert len(built.train_ids) == 12
    with pytest.raises(DataError, match=r"a\.parquet: no text column 'text' \(found: body, n\)"):
        listed(tmp_path, Source(path="a.parquet"))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_a_data_set_is_read_as_a_stream(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    texts = paragraphs(60, seed=1)
    for split in ("train", "test"):
        rows = [json.dumps({"question": split, "answer": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    source = Source(hub=str(folder), text="{question} {answer}")
    assert listed(tmp_path, source)[:2] == [(f"{folder}:train:{i}", f"train {texts[i]}") for i in range(2)]
    assert listed(tmp_path, Source(hub=str(folder), split="test", text="question"))[59][1] == "test"
    built = build(recipe(tmp_path, learn=source), {}, tokenizer, seed=1)
    assert len(built.train_ids) == 12
    with pytest.raises(DataError, match="row 0: no text column 'text'"):
        listed(tmp_path, Source(hub=str(folder)))
    with pytest.raises(DataError, match="cannot be read") as caught:
        listed(tmp_path, Source(hub=str(tmp_path / "missing")))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="gensim is not installed")
def test_the_embedded_articles() -> None:
    found = list(sources.read(Source(embedded="wikipedia")))
    assert len(found) > 50
    assert len({name for name, _ in found}) == len(found)
    name, text = found[0]
    assert name.startswith("wikipedia:")
    assert text.startswith("Anarchism\n\n")
    assert not any(mark in text for mark in ("[[", "{{", "'''"))


def test_the_embedded_functions() -> None:
    stream = sources.read(Source(embedded="python"))
    found = [next(stream) for _ in range(20)]
    assert all(text.startswith("def ") for _, text in found)
    assert all(name.startswith("python:") for name, _ in found)
    again = sources.read(Source(embedded="python"))
    assert [next(again) for _ in range(20)] == found


# ---- evaluation texts


def test_rows_are_joined_as_those_of_wikitext_are(tmp_path: Path) -> None:
    """The Hub's rows of WikiText are lines that keep their newline, a blank one is the empty string."""
    content = " \n = Robert = \n \n Robert is an actor . \n"
    (tmp_path / "wiki.txt").write_text(content, encoding="utf-8")
    joined = corpus.read_text(Text(path="wiki.txt", rows_joined_by="\n\n"), recipe(tmp_path))
    assert joined == "\n\n".join(["", " = Robert = \n", "", " Robert is an actor . \n"])
    assert corpus.read_text(Text(path="wiki.txt"), recipe(tmp_path)) == content


def test_an_evaluation_text_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n')
    assert corpus.read_text(Text(path="a.jsonl", text="{q}={a}"), recipe(tmp_path)) == "one=1\n\ntwo=2"


def test_a_missing_evaluation_text_is_named(text_file: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        build(recipe(text_file.parent), {"t": Text(path="none.txt")}, tokenizer, seed=1)
