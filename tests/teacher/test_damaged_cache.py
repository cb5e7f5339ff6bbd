"""Damage to a cache is an error that names the file, or harmless."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import equal, filled, ragged, shards, sure
from transformers import PreTrainedModel

from sparsekd import files, records
from sparsekd.errors import DataError, MismatchError, SparseKDError
from sparsekd.teacher import (
    Cache,
)
from sparsekd.teacher.writing import Writer


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return sure(make_model)


@pytest.fixture(scope="module")
def blocks() -> dict[int, np.ndarray]:
    return ragged()


def test_a_flipped_byte_is_noticed_or_harmless(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks)
    original = {i: cache.read(i, tokens) for i, tokens in blocks.items()}
    path = tmp_path / "part-00001.parquet"
    inside = files.read_json(tmp_path / "manifest.json")["shards"][1]["block_ids"]
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x24
        path.write_bytes(damaged)
        opened = Cache(tmp_path)
        errors = []
        for block_id in inside:
            try:
                assert equal(opened.read(block_id, blocks[block_id]), original[block_id]), position
            except SparseKDError as error:
                assert path.name in str(error)
                assert "\n" not in str(error)
                errors.append(error)
        noticed += bool(errors)
        with contextlib.suppress(SparseKDError), Writer.open(tmp_path, cache.identity) as writer:
            assert writer.has(1, inside)  # what a continued run asks
    assert noticed > len(content) / 3 / 2


def test_a_flipped_bit_of_the_manifest_is_noticed_or_harmless(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks)
    original = {i: cache.read(i, tokens) for i, tokens in blocks.items()}
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 4):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position // 4 % 7
        path.write_bytes(damaged)
        try:
            opened = Cache(tmp_path)
            for block_id, tokens in blocks.items():
                assert equal(opened.read(block_id, tokens), original[block_id]), position
        except SparseKDError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > len(content) / 4 / 4  # the others hit blanks and the identity's values


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_torn_shard_is_noticed_when_the_cache_is_opened_or_continued(
    part: float, model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    path = tmp_path / "part-00002.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"part-00002\.parquet is damaged: .* expected"):
        Cache(tmp_path)
    with pytest.raises(DataError, match=r"part-00002\.parquet is damaged"):
        filled(model, tmp_path, blocks)


def test_a_missing_shard_is_named_and_made_again(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks)
    before = shards(tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet is damaged: 0 bytes"):
        Cache(tmp_path)
    inside = cache.shards[1].block_ids[0]
    with pytest.raises(DataError, match=r"part-00001\.parquet"):
        cache.read(inside, blocks[inside])
    filled(model, tmp_path, blocks)
    assert shards(tmp_path) == before


def test_shards_that_changed_places_are_noticed(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    """Two shards of one size: only what a row says about itself can tell them apart."""
    generator = np.random.default_rng(2)
    blocks = {i: generator.integers(0, 400, 12).astype(np.int32) for i in range(4)}
    filled(model, tmp_path, blocks, blocks_per_shard=2)
    paths = [tmp_path / f"part-0000{number}.parquet" for number in range(2)]
    contents = [path.read_bytes() for path in paths]
    manifest = records.read(tmp_path / "manifest.json")
    for path, content, shard in zip(paths, reversed(contents), manifest["shards"], strict=True):
        path.write_bytes(content)
        shard["bytes"] = len(content)
    records.write(tmp_path / "manifest.json", manifest)
    with pytest.raises(MismatchError, match=r"part-00000\.parquet holds other blocks than it should"):
        Cache(tmp_path).read(0, blocks[0])


def test_a_missing_or_damaged_manifest(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(tmp_path / "nowhere")
    filled(model, tmp_path, blocks)
    path = tmp_path / "manifest.json"
    whole = records.read(path)
    damaged: list[Any] = [
        {key: value for key, value in whole.items() if key != left} for left in ("identity", "shards")
    ]
    damaged += [[], None, {**whole, "shards": [{}]}, {**whole, "identity": {"top_k": "many"}}]
    outside = [
        {**whole["shards"][0], "name": name} for name in ("../part-00000.parquet", "/etc/passwd", "part-0.parquet")
    ]
    damaged += [{**whole, "shards": [shard]} for shard in outside]
    for value in damaged:
        files.write_json(path, value)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            Cache(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Cache(tmp_path)
    filled(model, tmp_path, blocks)  # the shards are whole: only the manifest is made again
    assert records.read(path) == whole


def test_a_shard_of_another_cache_is_noticed(
    model: PreTrainedModel, make_model: Callable[[str], PreTrainedModel], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path / "ours", blocks)
    filled(make_model("llama"), tmp_path / "theirs", blocks)
    foreign = (tmp_path / "theirs/part-00001.parquet").read_bytes()
    (tmp_path / "ours/part-00001.parquet").write_bytes(foreign)
    manifest = records.read(tmp_path / "ours/manifest.json")
    manifest["shards"][1]["bytes"] = len(foreign)  # as if it were of the same size
    records.write(tmp_path / "ours/manifest.json", manifest)
    inside = manifest["shards"][1]["block_ids"][0]
    with pytest.raises(MismatchError, match=r"part-00001\.parquet was made with teacher = "):
        Cache(tmp_path / "ours").read(inside, blocks[inside])
    assert list(cache.damaged_shards()) == ["part-00001.parquet"]
