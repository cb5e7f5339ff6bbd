"""Text to blocks: what gets in, what is kept apart, and the order of an epoch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import documents, recipe, same
from tiny import WORDS, paragraphs

from sparsekd import corpus
from sparsekd.corpus import Corpus, Share, beginning, blocks_from_texts, build, encode, sources
from sparsekd.errors import DataError
from sparsekd.recipe import Source, Text

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


def test_a_special_token_spelled_out_stays_text(tokenizer: Any) -> None:
    text = "a <|endoftext|> b"
    ids = encode(tokenizer, text)
    assert tokenizer.eos_token_id in tokenizer(text).input_ids  # what happens otherwise
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert encode(tokenizer, "") == []


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
