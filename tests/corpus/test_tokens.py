"""Long texts are tokenised piece by piece, and nobody can tell from the ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import paragraphs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsekd import corpus
from sparsekd.corpus import tokens
from sparsekd.recipe import Corpus, Source

PROSE = "\n\n".join(paragraphs(40, seed=3))
CODE = "\n".join(
    f"{' ' * 4 * (number % 5)}window_{number} = [garden({number}),  'silver']\t# x" for number in range(200)
)
CHINESE = "\u6cb3\u6d41\u548c\u82b1\u56ed\u3002" * 900


class Watched:
    """A tokenizer that keeps the length of the longest text that it was given."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.longest = tokenizer, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """One that puts a space before every text, as Llama's does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([*paragraphs(50, seed=0), CODE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("piece", [100, 1000])
@pytest.mark.parametrize("text", [PROSE, CODE, "short", ""], ids=["prose", "code", "short", "empty"])
@pytest.mark.parametrize("kind", ["tokenizer", "gemma_like", "llama_like"])
def test_a_long_text_has_the_ids_that_it_has_in_one_piece(
    kind: str, text: str, piece: int, request: Any, monkeypatch: Any
) -> None:
    tokenizer = Watched(request.getfixturevalue(kind))
    whole = tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(tokens, "_PIECE", piece)
    monkeypatch.setattr(tokens, "_NEAR", piece // 2)
    tokenizer.longest = 0
    assert tokens.encode(tokenizer, text) == whole
    assert tokenizer.longest <= max(piece, 2 * tokens._CLOSE)


@pytest.mark.parametrize("text", [CHINESE, "x" * 5000, " " * 5000], ids=["Chinese", "a word", "spaces"])
def test_a_text_without_spaces_between_words_is_cut_all_the_same(text: str, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokens, "_PIECE", 1000)
    ids = tokens.encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text).input_ids or text.isspace()


@pytest.mark.parametrize(
    "write",
    [
        lambda path, rows: pq.write_table(pa.table({"text": rows}), path.with_suffix(".parquet")),
        lambda path, rows: path.with_suffix(".txt").write_text("\n\n".join(rows)),
    ],
    ids=["parquet", "txt"],
)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("row", [" ".join(PROSE.split()) * 300, "x" * 3_000_000], ids=["a book", "a word"])
def test_a_row_of_megabytes_becomes_blocks_in_bounded_memory(
    row: str, pack: bool, write: Callable[[Path, list[str]], None], tokenizer: Any, tmp_path: Path
) -> None:
    assert len(row) > 2_900_000
    write(tmp_path / "learn", [row, row[1:], row[2:]])
    (name,) = (path.name for path in tmp_path.iterdir())
    recipe = Corpus(root=str(tmp_path), sources={"learn": Source(path=name)}, seq_len=32, num_blocks=2, pack=pack)
    watched = Watched(tokenizer)
    built = corpus.build(recipe, {}, watched, seed=1)
    assert len(built.train_ids) == 2 and len(built.validation_ids) >= 1
    assert 0 < watched.longest <= tokens._PIECE
