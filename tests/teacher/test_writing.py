"""Writing a cache: interrupted, refused, by several processes, on a disk that fills up."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caches import LENGTHS, TOP_K, contents, equal, filled, made_of, ragged, shards, sure, targets
from transformers import PreTrainedModel

from sparsekd import files, records
from sparsekd.corpus import Share
from sparsekd.errors import DataError, MismatchError, ResourceError, UsageError
from sparsekd.teacher import Cache, Targets, fill, merge_shares
from sparsekd.teacher.writing import Writer


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return sure(make_model)


@pytest.fixture(scope="module")
def blocks() -> dict[int, np.ndarray]:
    return ragged()


# ---- interrupted


class Interrupted(Exception):
    """Stands for a kill."""


def test_continued_after_an_interruption_it_is_byte_for_byte_the_same(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    seen: list[int] = []
    filled(model, tmp_path / "whole", blocks, on_tokens=seen.append)
    assert sum(seen) == sum(LENGTHS)

    def stop_in_the_second_shard(num_tokens: int) -> None:
        if (tmp_path / "cut" / "part-00000.parquet").exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        filled(model, tmp_path / "cut", blocks, on_tokens=stop_in_the_second_shard)
    whole_shards = list(shards(tmp_path / "whole"))
    left = list(shards(tmp_path / "cut"))
    assert left == whole_shards[: len(left)]
    assert len(left) < len(whole_shards)
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(tmp_path / "cut")
    first = tmp_path / "cut" / "part-00000.parquet"
    written = first.stat().st_mtime_ns
    (tmp_path / "cut" / f"{whole_shards[len(left)]}.tmp-1").write_text("left by a killed process")

    again: list[int] = []
    cache = filled(model, tmp_path / "cut", blocks, on_tokens=again.append)
    listed = files.read_json(tmp_path / "cut" / "manifest.json")["shards"][: len(left)]
    not_again = [i for shard in listed for i in shard["block_ids"]]
    assert again[0] == sum(len(blocks[i]) for i in not_again)
    assert sum(again) == sum(LENGTHS)
    assert first.stat().st_mtime_ns == written
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {*shards(tmp_path / "whole"), "manifest.json"}
    whole = Cache(tmp_path / "whole")
    assert all(equal(cache.read(i, tokens), whole.read(i, tokens)) for i, tokens in blocks.items())


def test_a_whole_cache_is_not_made_again(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    filled(model, tmp_path, blocks)
    seen: list[int] = []
    assert set(filled(model, tmp_path, blocks, on_tokens=seen.append).block_ids) == set(blocks)
    assert seen == [sum(LENGTHS)]  # what was there, and no pass


# ---- what may not be written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_data_error(
    value: float, make_model: Callable[[str], PreTrainedModel], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    broken = make_model("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[int(blocks[97][3])] = value
    with pytest.raises(DataError, match=r"block \d+ are not finite"):
        filled(broken, tmp_path, blocks, blocks_per_shard=100)
    assert shards(tmp_path) == {}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (targets(0, -1.0, -1.0), "do not sum to one"),
        (targets(10, 0.0, -30.0), "outside the vocabulary of 10"),
        (targets(-1, 0.0, -30.0), "outside the vocabulary of 10"),
        (targets(1, 0.0, torch.nan), "are not finite"),
    ],
)
def test_what_is_not_a_distribution_over_the_vocabulary_is_refused(
    targets: Targets, message: str, tmp_path: Path
) -> None:
    with (
        Writer.open(tmp_path, {"codec": "q16", "top_k": 1, "vocab_size": 10}) as writer,
        pytest.raises(DataError, match=f"teacher distributions of block 5 .*{message}|block 5 {message}"),
    ):
        writer.add(0, [5], [np.array([1, 2], np.int32)], [targets])
    assert shards(tmp_path) == {}


def test_a_disk_that_is_too_small_is_noticed_before_the_first_pass(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]

    def forbidden(num_tokens: int) -> None:
        raise Interrupted

    with pytest.raises(ResourceError, match="the teacher cache needs about"):
        filled(model, tmp_path, blocks, on_tokens=forbidden)


# ---- what a shard holds


def test_a_shard_says_itself_what_it_was_made_from(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    manifest = files.read_json(tmp_path / "manifest.json")
    assert manifest["identity"] == made_of(model)
    listed: list[int] = []
    for shard in manifest["shards"]:
        said = json.loads(pq.read_schema(tmp_path / shard["name"]).metadata[b"sparsekd"])
        assert said["identity"] == manifest["identity"]
        assert said["block_ids"] == shard["block_ids"]
        listed += shard["block_ids"]
    assert listed == sorted(blocks, key=lambda i: (len(blocks[i]), i))  # by length: nothing is padded


def test_a_cache_of_another_format_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    blocks = {0: np.arange(20, dtype=np.int32)}
    filled(model, tmp_path, blocks)
    manifest = records.read(tmp_path / "manifest.json")
    of_old = {"codec": "q16-1", **{key: value for key, value in manifest.items() if key != "format"}}
    for changed, found in ((of_old, "q16-1"), (manifest | {"format": 3}, "3")):
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(MismatchError, match=f"has the cache format {found}, this version reads 2: use --fresh"):
            Cache(tmp_path)


# ---- several processes


def test_parts_unite_to_the_cache_that_one_process_writes(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path / "one", blocks)
    folder = tmp_path / "three"
    for number in (3, 1):
        assert fill_share(model, folder, blocks, Share(number, 3)) is None
    with pytest.raises(DataError, match=r"shard 2/3 is not finished: run sparsekd cache with --shard 2/3"):
        merge_shares(folder, blocks)
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(folder)
    fill_share(model, folder, blocks, Share(2, 3))
    with pytest.raises(DataError, match=r"lacks 1 of the 11 blocks that are needed, the first is block 1000"):
        merge_shares(folder, [*blocks, 1000])
    for _ in range(2):  # merged once more, it stays what it is
        assert set(merge_shares(folder, blocks).block_ids) == set(blocks)
    assert contents(folder) == contents(tmp_path / "one")


def test_parts_of_different_things_do_not_unite(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds no finished shard"):
        tmp_path.mkdir(exist_ok=True)
        merge_shares(tmp_path, blocks)
    fill_share(model, tmp_path, blocks, Share(1, 2))
    fill_share(model, tmp_path, blocks, Share(2, 2), corpus_fingerprint="d")
    with pytest.raises(MismatchError, match=r"manifest-2-of-2\.json was made with corpus = d, now asked for c"):
        merge_shares(tmp_path, blocks)
    fill_share(model, tmp_path, blocks, Share(3, 4))
    with pytest.raises(UsageError, match="manifests of 2 and of 4 shards"):
        merge_shares(tmp_path, blocks)


def test_a_part_lost_after_it_was_finished_is_named(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    for number in (1, 2):
        fill_share(model, tmp_path, blocks, Share(number, 2))
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet is damaged: 0 bytes"):
        merge_shares(tmp_path, blocks)
    fill_share(model, tmp_path, blocks, Share(2, 2))
    merge_shares(tmp_path, blocks)


def test_two_writers_of_one_part(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    with Writer.open(tmp_path, made_of(model), Share(2, 3)):
        with pytest.raises(UsageError, match=r"part 2/3 of the cache .* is in use by process \d+"):
            fill_share(model, tmp_path, blocks, Share(2, 3))
        (tmp_path / "part-00001.parquet.tmp-1").write_text("at work")
        fill_share(model, tmp_path, blocks, Share(1, 3))  # another part is free, and leaves the others' files alone
        assert (tmp_path / "part-00001.parquet.tmp-1").exists()
    fill_share(model, tmp_path, blocks, Share(2, 3))
    assert not (tmp_path / "part-00001.parquet.tmp-1").exists()
    assert not list(tmp_path.glob("*.lock"))


def fill_share(
    model: PreTrainedModel, folder: Path, blocks: dict[int, np.ndarray], share: Share, corpus_fingerprint: str = "c"
) -> Cache | None:
    options = {"tokenizer_hash": "t", "corpus_fingerprint": corpus_fingerprint, "top_k": TOP_K, "blocks_per_shard": 3}
    return fill(model, folder, blocks, **options, batch_size=2, share=share)


def test_a_full_disk_keeps_the_whole_shards(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    """The system's own limit on the size of a file stands for a disk that fills up."""
    filled(model, tmp_path / "whole", blocks)
    sizes = [len(content) for content in shards(tmp_path / "whole").values()]
    assert sizes[2] > max(sizes[:2])  # blocks come sorted by length
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes[:2]), before[1]))
    try:
        with pytest.raises(ResourceError, match=r"no space left while writing .*part-00002\.parquet"):
            filled(model, tmp_path / "full", blocks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(contents(tmp_path / "full")) == ["part-00000.parquet", "part-00001.parquet"]
    filled(model, tmp_path / "full", blocks)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
