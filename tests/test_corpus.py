"""Text to blocks: what gets in, what is kept out, the order of an epoch, and damage on disk."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, paragraphs
from hypothesis import given
from hypothesis import strategies as st

from sparsekd import corpus, files, records, sources
from sparsekd.corpus import (
    Corpus,
    Guard,
    Overlap,
    Share,
    blocks_from_texts,
    build,
    load,
    save,
    text_path,
)
from sparsekd.errors import DataError, SparseKDError, UsageError
from sparsekd.recipe import Corpus as CorpusRecipe
from sparsekd.recipe import Source, Text
from sparsekd.tokens import beginning, encode

SENTENCE = [f"step{number}" for number in range(1, 14)]  # thirteen words


def recipe(root: Path, *, learn: Source | None = None, **changes: Any) -> CorpusRecipe:
    """A corpus of `learn.txt` alone unless `sources` are given."""
    values = {"seq_len": 32, "num_blocks": 12, "num_validation_blocks": 3, **changes}
    return CorpusRecipe(root=str(root), **{"sources": {"learn": learn or Source(path="learn.txt")}, **values})


@pytest.fixture
def built(text_file: Path, tokenizer: Any) -> Corpus:
    (text_file.parent / "other.txt").write_text("An evaluation text,\r\nwith é and both kinds of line ends.\n")
    learn = Source(path=text_file.name, holdout=0.2)
    texts = {"other": Text(path="other.txt"), "held": Text(holdout_of="learn")}
    return build(recipe(text_file.parent, learn=learn), texts, tokenizer, seed=1)


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


# ---- blocks and their order


def test_two_builds_are_equal_and_another_seed_is_not(text_file: Path, tokenizer: Any) -> None:
    one, again, other = (build(recipe(text_file.parent), {}, tokenizer, seed) for seed in (1, 1, 2))
    assert same(one, again)
    assert one.fingerprint != other.fingerprint


def test_blocks_have_the_asked_number_and_length(built: Corpus) -> None:
    assert len(built.train_ids) == 12
    assert len(built.validation_ids) == 3
    assert {len(block.tokens) for block in built.blocks} == {32}
    assert built.num_tokens == 12 * 32
    assert [len(tokens) for tokens in built.tokens(built.train_ids[:2].tolist())] == [32, 32]
    assert sorted({*built.train_ids, *built.validation_ids}) == list(range(len(built.blocks)))


def test_order_is_a_pure_permutation_that_differs_between_epochs(built: Corpus) -> None:
    first = built.order(7, 0)
    assert sorted(first) == sorted(built.train_ids)
    built.order(7, 5)  # in between: nothing is remembered
    assert np.array_equal(built.order(7, 0), first)
    assert not np.array_equal(first, built.train_ids)
    assert not np.array_equal(built.order(7, 1), first)
    assert not np.array_equal(built.order(8, 0), first)


def test_shares_divide_the_blocks_and_keep_theirs_in_every_epoch(built: Corpus) -> None:
    shares = [Share(number, 5) for number in range(1, 6)]
    first = [built.order(7, 0, share) for share in shares]
    assert sorted(np.concatenate(first)) == sorted(built.train_ids)
    assert [len(ids) for ids in first] == [3, 3, 2, 2, 2]
    second = [built.order(7, 1, share) for share in shares]
    assert all(sorted(one) == sorted(other) for one, other in zip(first, second, strict=True))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert sorted(built.order(8, 0, shares[0])) != sorted(first[0])  # another seed divides otherwise


def test_a_block_holds_the_text_of_the_documents_it_names(built: Corpus, text_file: Path, tokenizer: Any) -> None:
    by_id = dict(sources.read(Source(path=text_file.name), str(text_file.parent)))
    for block in built.blocks:
        text = tokenizer.decode(block.tokens)
        pieces = text.split("<|endoftext|>")
        assert len(pieces) in (len(block.documents), len(block.documents) + 1)  # a separator may be the last token
        for piece, name in zip(pieces, block.documents, strict=False):
            assert piece in by_id[name]


def test_weights_decide_the_shares(tmp_path: Path, tokenizer: Any) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs(200, seed=number)))
    both = {"a": Source(path="a.txt", weight=6.0), "b": Source(path="b.txt", weight=2.0)}
    built = build(recipe(tmp_path, sources=both, num_blocks=40, num_validation_blocks=8), {}, tokenizer, seed=1)
    assert Counter(built.blocks[i].source for i in built.train_ids) == {"a": 30, "b": 10}
    assert Counter(built.blocks[i].source for i in built.validation_ids) == {"a": 6, "b": 2}
    assert {name: report.drawn for name, report in built.reports.items()} == {"a": 30, "b": 10}


def test_a_source_smaller_than_its_share_repeats_evenly(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text("\n\n".join(paragraphs(12, seed=1)))
    built = build(recipe(tmp_path, num_blocks=100, num_validation_blocks=1), {}, tokenizer, seed=1)
    report = built.reports["learn"]
    assert report.drawn == len(built.train_ids) == 100
    assert report.documents == 12
    assert 1 < report.blocks < 50
    counts = Counter(built.train_ids.tolist())
    assert len(counts) == report.blocks
    assert max(counts.values()) - min(counts.values()) <= 1
    assert sorted(built.order(3, 1)) == sorted(built.train_ids)


def test_without_packing_a_block_is_one_document_cut_at_seq_len(text_file: Path, tokenizer: Any) -> None:
    by_id = dict(sources.read(Source(path=text_file.name), str(text_file.parent)))
    seq_len = 60
    built = build(recipe(text_file.parent, pack=False, seq_len=seq_len, num_blocks=150), {}, tokenizer, seed=1)
    for block in built.blocks:
        (name,) = block.documents
        assert block.tokens.tolist() == encode(tokenizer, by_id[name])[:seq_len]
    lengths = {len(block.tokens) for block in built.blocks}
    assert max(lengths) == seq_len
    assert len(lengths) > 1


def test_without_packing_documents_that_teach_nothing_are_skipped(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "learn.txt").write_text("\n\n".join([*["ab"] * 30, *paragraphs(30, seed=1)]))
    built = build(recipe(tmp_path, pack=False), {}, tokenizer, seed=1)
    assert min(len(block.tokens) for block in built.blocks) >= 8
    assert built.reports["learn"].documents == 60


def test_blocks_from_texts_joins_by_the_end_of_text_token(tokenizer: Any) -> None:
    texts = paragraphs(5, seed=3)
    blocks = corpus.blocks_from_texts(texts, tokenizer, seq_len=16)
    stream = [token for text in texts for token in [*encode(tokenizer, text), tokenizer.eos_token_id]]
    assert blocks.dtype == np.int64
    assert blocks.reshape(-1).tolist() == stream[: len(stream) // 16 * 16]
    with pytest.raises(DataError, match="shorter than one block of 64"):
        corpus.blocks_from_texts(["short"], tokenizer, seq_len=64)


# ---- what is kept apart


def test_held_out_and_validation_documents_are_not_trained_on(text_file: Path, built: Corpus) -> None:
    listed = list(sources.read(Source(path=text_file.name), str(text_file.parent)))
    held = {name for name, _ in listed[160:]}
    assert len(listed) == 200
    assert built.texts["held"] == "\n\n".join(text for _, text in listed[160:])
    assert not held & documents(built, built.train_ids)
    assert not held & documents(built, built.validation_ids)
    assert not documents(built, built.validation_ids) & documents(built, built.train_ids)
    assert built.reports["learn"].documents == 160


@pytest.mark.parametrize("pack", [True, False])
def test_they_stay_apart_when_everything_is_used(pack: bool, text_file: Path, tokenizer: Any) -> None:
    learn = Source(path=text_file.name, holdout=0.1)
    wanted = recipe(text_file.parent, learn=learn, num_blocks=5000, num_validation_blocks=500, pack=pack)
    built = build(wanted, {"held": Text(holdout_of="learn")}, tokenizer, seed=1)
    trained, validated = documents(built, built.train_ids), documents(built, built.validation_ids)
    assert len(trained) > 150  # of 180, one in ten of which is for validation
    assert len(validated) > 15
    assert not trained & validated
    assert max(int(name.rpartition(":")[2]) for name in trained | validated) < 180


def test_a_single_document_gives_up_training_blocks_for_validation(tmp_path: Path, tokenizer: Any) -> None:
    """The documented fallback: the document goes to validation by number, so two are needed."""
    (tmp_path / "learn.txt").write_text("Too short for a block.\n\n" + " ".join(paragraphs(30, seed=1)))
    built = build(recipe(tmp_path), {}, tokenizer, seed=1)
    assert not set(built.train_ids) & set(built.validation_ids)
    assert documents(built, built.validation_ids) == {"learn.txt:1"}
    chosen = [built.blocks[i].tokens.tolist() for i in {*built.train_ids, *built.validation_ids}]
    assert len({tuple(tokens) for tokens in chosen}) == len(chosen)


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


def test_a_special_token_spelled_out_stays_text(tokenizer: Any) -> None:
    text = "a <|endoftext|> b"
    ids = encode(tokenizer, text)
    assert tokenizer.eos_token_id in tokenizer(text).input_ids  # what happens otherwise
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert encode(tokenizer, "") == []


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
        "from sparsekd import sources; from sparsekd.recipe import Source\n"
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


# ---- on disk


def test_a_saved_corpus_is_loaded_equal(built: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    save(built, folder)
    assert same(load(folder), built)
    assert "\r\n" in load(folder).texts["other"]
    assert np.array_equal(load(folder).order(3, 2), built.order(3, 2))


def test_a_name_that_is_not_a_file_name_is_refused(tmp_path: Path) -> None:
    assert text_path(tmp_path, "wiki-2.raw_x") == tmp_path / "text-wiki-2.raw_x.txt"
    for name in ("a/b", "", "a b", "../../x"):
        with pytest.raises(UsageError):
            text_path(tmp_path, name)


def test_flipped_bytes_of_the_blocks_are_noticed(built: Corpus, tmp_path: Path) -> None:
    save(built, tmp_path)
    path = tmp_path / "blocks.parquet"
    content = path.read_bytes()
    noticed = 0
    for position in np.linspace(0, len(content) - 1, 60).astype(int):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        try:
            assert same_training(load(tmp_path), built), position
        except DataError as error:
            assert "is damaged" in str(error)
            noticed += 1
    assert noticed > 40  # the others hit bytes that nothing is read from
    path.write_bytes(content)
    assert same(load(tmp_path), built)


def test_flipped_bits_of_the_manifest_are_noticed(built: Corpus, tmp_path: Path) -> None:
    save(built, tmp_path)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        try:
            assert same_training(load(tmp_path), built), position
        except SparseKDError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > len(content) / 5 / 4  # the others hit blanks and what the reports count


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_torn_blocks_are_noticed(keep: float, built: Corpus, tmp_path: Path) -> None:
    save(built, tmp_path)
    path = tmp_path / "blocks.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(DataError, match="is damaged"):
        load(tmp_path)


def remove_key(key: str) -> Any:
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        *(remove_key(key) for key in ("fingerprint", "train_ids", "validation_ids", "texts", "sources")),
        lambda manifest: {**manifest, "fingerprint": "0" * 16},
        lambda manifest: {**manifest, "train_ids": manifest["train_ids"][::-1]},
        lambda manifest: {**manifest, "train_ids": [*manifest["train_ids"][1:], 10**6]},
        lambda manifest: {**manifest, "train_ids": [*manifest["train_ids"][1:], 10**30]},
        lambda manifest: {**manifest, "validation_ids": [-(10**30)]},
        lambda manifest: {**manifest, "separator": 10**4000},
        lambda manifest: {**manifest, "train_ids": ["a"]},
        lambda manifest: {**manifest, "train_ids": None},
        lambda manifest: {**manifest, "validation_ids": []},
        lambda manifest: {**manifest, "texts": ["other"]},
        lambda manifest: {**manifest, "texts": [*manifest["texts"], "none"]},
        lambda manifest: {**manifest, "sources": {"learn": {"colour": 1}}},
        lambda manifest: {**manifest, "sources": []},
        lambda manifest: [],
        lambda manifest: None,
    ],
)
def test_a_damaged_manifest_is_noticed(damage: Any, built: Corpus, tmp_path: Path) -> None:
    save(built, tmp_path)
    path = tmp_path / "manifest.json"
    files.write_json(path, damage(records.read(path)))
    with pytest.raises(DataError, match="is damaged"):
        load(tmp_path)


def test_missing_and_changed_files_are_noticed(built: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        load(tmp_path / "nowhere")
    for name in ("manifest.json", "blocks.parquet", "text-other.txt"):
        folder = tmp_path / f"without-{name}"
        save(built, folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match=re.escape(name)):
            load(folder)
    folder = tmp_path / "changed"
    save(built, folder)
    text = text_path(folder, "held")
    text.write_text(text.read_text().replace(WORDS[0], WORDS[1], 1))
    with pytest.raises(DataError, match=r"text-held\.txt is damaged"):
        load(folder)
    text.write_bytes(b"\xff")
    with pytest.raises(SparseKDError, match="is damaged"):
        load(folder)


# ---- what a tokenizer puts before a text


def test_most_tokenizers_put_nothing_before_a_text(tokenizer: Any, gemma_like: Any) -> None:
    assert beginning(tokenizer) == []
    assert beginning(gemma_like) == [gemma_like.bos_token_id]


@pytest.mark.parametrize("document_mask", [False, True])
def test_every_block_begins_as_the_tokenizer_begins_a_text(
    document_mask: bool, tokenizer: Any, gemma_like: Any, text_file: Path, tmp_path: Path
) -> None:
    wanted = recipe(tmp_path, num_blocks=40, num_validation_blocks=4, document_mask=document_mask)
    bos, eos = gemma_like.bos_token_id, gemma_like.eos_token_id
    built = build(wanted, {}, gemma_like, seed=1)
    assert len(built.blocks) == 44
    for block in built.blocks:
        assert len(block.tokens) == 32 and block.tokens[0] == bos
        inner = np.flatnonzero(block.tokens[1:] == bos)
        assert all(block.tokens[1:][inner - 1] == eos) and (document_mask or not len(inner))
        if document_mask:  # and each document does that is seen as one
            ends = np.flatnonzero(block.tokens[:-1] == eos)
            assert all(block.tokens[ends + 1] == bos)
    plain = build(wanted, {}, tokenizer, seed=1)
    assert all(bos not in block.tokens for block in plain.blocks)
    # no text is lost to it: without the beginnings the stream is the same
    texts = paragraphs(40, seed=3)
    stream = [t for row in blocks_from_texts(texts, gemma_like, 16) for t in row.tolist() if t != bos]
    expected = [t for row in blocks_from_texts(texts, tokenizer, 16) for t in row.tolist()]
    length = min(len(stream), len(expected))
    assert length > 1000 and stream[:length] == expected[:length]


def test_documents_of_their_own_begin_as_the_tokenizer_begins_a_text(
    gemma_like: Any, text_file: Path, tmp_path: Path
) -> None:
    blocks = build(recipe(tmp_path, seq_len=24, pack=False), {}, gemma_like, seed=1).blocks
    assert all(block.tokens[0] == gemma_like.bos_token_id and len(block.tokens) <= 24 for block in blocks)


# ---- sources of few documents


def test_a_source_of_one_document_is_split_by_position(tokenizer: Any, tmp_path: Path) -> None:
    """A book: its last tenth is for validation, the rest for training."""
    words = [f"{a} {b}" for a in WORDS for b in WORDS]
    (tmp_path / "book.txt").write_text(" ".join(words))
    book = Source(path="book.txt", split="never")
    built = build(recipe(tmp_path, learn=book, num_blocks=500, num_validation_blocks=4), {}, tokenizer, seed=1)
    learned = {built.blocks[i].tokens.tobytes() for i in built.train_ids}
    held = [built.blocks[i].tokens for i in built.validation_ids]
    assert len(held) == 4 and len(learned) > 30 and not any(block.tobytes() in learned for block in held)
    tail = " ".join(words[len(words) * 9 // 10 - 2 :])
    assert all(tokenizer.decode(block) in tail for block in held)


def test_a_short_document_beside_a_book_does_not_become_all_the_training_text(tokenizer: Any, tmp_path: Path) -> None:
    book = " ".join(f"{a} {b}" for a in WORDS for b in WORDS)
    (tmp_path / "two.txt").write_text(book + "\n\n" + " ".join(WORDS * 3))
    built = build(recipe(tmp_path, learn=Source(path="two.txt"), num_blocks=90), {}, tokenizer, seed=1)
    assert built.reports["learn"].blocks > 60
