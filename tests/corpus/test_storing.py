"""A corpus on disk: loaded as it was saved, and damage is noticed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import same, same_training
from tiny import WORDS

from sparsekd import files, records
from sparsekd.corpus import Corpus, load, save
from sparsekd.corpus.storing import text_path
from sparsekd.errors import DataError, SparseKDError, UsageError


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
