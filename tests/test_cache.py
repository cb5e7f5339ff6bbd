"""The teacher cache: what is read is what the teacher said about these tokens, or an error that names the file."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

from sparsekd import files
from sparsekd.cache import Cache, Targets, Writer, bytes_per_token
from sparsekd.errors import DataError, MismatchError, ResourceError, SparseKDError
from sparsekd.teacher import cache_teacher, distributions, fill, identity, top_k_distribution

TOP_K = 8
LENGTHS = [24, 24, 9, 24, 17, 9, 24, 17, 2, 24]


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """With an output layer twenty times as large, so that its distributions are far from uniform."""
    made = make_model("llama")
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20.0)
    return made


@pytest.fixture(scope="module")
def blocks() -> dict[int, np.ndarray]:
    """Blocks of different lengths, whose ids are neither dense nor sorted."""
    generator = np.random.default_rng(0)
    return {97 - 7 * i: generator.integers(0, 400, length).astype(np.int32) for i, length in enumerate(LENGTHS)}


def filled(model: PreTrainedModel, folder: Path, blocks: dict[int, np.ndarray], **changes: Any) -> Cache:
    options = {"tokenizer": "t", "corpus_fingerprint": "c", "top_k": TOP_K, "blocks_per_shard": 3, "batch_size": 2}
    return fill(model, folder, blocks, **{**options, **changes})


def equal(a: Targets, b: Targets) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


# ---- content


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_read_is_what_the_teacher_said(
    batch_size: int, model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks, batch_size=batch_size)
    assert set(cache.block_ids) == set(blocks)
    assert cache.num_bytes == sum(len(content) for content in shards(tmp_path).values())
    for block_id in np.random.default_rng(1).permutation(list(blocks)).tolist():  # any order
        tokens = blocks[block_id]
        found = cache.read(block_id, tokens)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :-1]
        expected = logits.double().log_softmax(-1)
        assert found.ids.shape == found.log_probs.shape == (len(tokens) - 1, TOP_K)
        assert torch.equal(found.ids, expected.topk(TOP_K).indices)
        assert torch.allclose(found.log_probs.double(), expected.topk(TOP_K).values, rtol=1e-3, atol=1e-4)
        total = found.log_probs.double().exp().sum(-1) + found.log_tail.double().exp()
        assert float((total - 1).abs().max()) < 2e-3
        tail = expected.scatter(-1, found.ids, -torch.inf).logsumexp(-1)
        assert torch.allclose(found.log_tail.double(), tail, rtol=1e-3, atol=1e-4)
        tail_half = (expected / 2).scatter(-1, found.ids, -torch.inf).logsumexp(-1)
        assert torch.allclose(found.log_tail_half.double(), tail_half, rtol=1e-3, atol=1e-4)
    assert float(expected.max(-1).values.exp().max()) > 0.1  # not a near-uniform teacher, where anything fits


def test_top_k_distribution_sums_the_tail_itself() -> None:
    logits = torch.tensor([[0.0, -20.0, -21.0, -19.0], [0.0, -90.0, -90.0, -80.0]])
    found = top_k_distribution(logits, 2)
    assert found.ids.tolist() == [[0, 3], [0, 3]]
    expected = logits[0, 1:3].double().logsumexp(-1) - logits[0].double().logsumexp(-1)
    assert found.log_tail[0].item() == pytest.approx(expected.item(), rel=1e-6)  # 1 minus the head would be 0 in fp32
    assert found.log_tail[1].item() == -30.0
    expected = (logits[0, 1:3].double() / 2).logsumexp(-1) - logits[0].double().logsumexp(-1) / 2
    assert found.log_tail_half[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.log_tail_half[1].item() == -15.0


def test_more_kept_than_there_are_tokens(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    cache = filled(model, tmp_path, blocks, top_k=1000)
    assert cache.top_k == 399  # one is left for the tail
    assert cache.read(97, blocks[97]).ids.shape == (23, 399)


def test_distributions_of_a_batch_are_those_of_its_blocks(model: PreTrainedModel) -> None:
    tokens = torch.randint(0, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    together = distributions(model, tokens, TOP_K)
    for row, found in zip(tokens, together, strict=True):
        (alone,) = distributions(model, row[None], TOP_K)
        assert torch.equal(found.ids, alone.ids)
        assert torch.allclose(found.log_probs, alone.log_probs, atol=1e-5)


def test_the_simple_way_in(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    tokens = torch.randint(0, 400, (5, 12), generator=torch.Generator().manual_seed(0))
    cache = cache_teacher(model, tokenizer, tokens, tmp_path / "cache", top_k=4)
    assert list(cache.block_ids) == [0, 1, 2, 3, 4]
    found = cache.read(3, tokens[3].numpy().astype(np.int32))
    assert torch.equal(found.ids, distributions(model, tokens[3:4], 4)[0].ids)
    with pytest.raises(MismatchError, match="corpus"):
        cache_teacher(model, tokenizer, tokens.flip(0), tmp_path / "cache", top_k=4)


# ---- pairing


def test_other_tokens_for_an_id_are_refused(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks)
    changed = blocks[97].copy()
    changed[-1] ^= 1
    for tokens in (changed, blocks[97][:-1], blocks[90]):
        with pytest.raises(MismatchError, match="block 97 was cached for other tokens"):
            cache.read(97, tokens)
    cache.read(97, blocks[97])


def test_an_id_that_is_not_there(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    cache = filled(model, tmp_path, blocks)
    with pytest.raises(DataError, match="has no block 96"):
        cache.read(96, blocks[97])


@pytest.mark.parametrize(
    ("key", "changes"),
    [("corpus", {"corpus_fingerprint": "d"}), ("tokenizer", {"tokenizer": "u"}), ("top_k", {"top_k": TOP_K - 1})],
)
def test_another_corpus_tokenizer_or_width_is_refused(
    key: str, changes: dict[str, Any], model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    before = shards(tmp_path)
    with pytest.raises(MismatchError, match=rf"part-00000\.parquet was made with {key} = "):
        filled(model, tmp_path, blocks, **changes)
    assert shards(tmp_path) == before
    wanted = identity(
        model, changes.get("tokenizer", "t"), changes.get("corpus_fingerprint", "c"), changes.get("top_k", TOP_K)
    )
    with pytest.raises(MismatchError, match=f"was made with {key} = "):
        Cache(tmp_path, wanted)
    Cache(tmp_path, identity(model, "t", "c", TOP_K))


def test_another_model_is_refused(
    model: PreTrainedModel, make_model: Callable[[str], PreTrainedModel], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    other = make_model("llama")  # the same architecture, other weights
    with pytest.raises(MismatchError, match="was made with teacher = "):
        filled(other, tmp_path, blocks)


def test_other_blocks_under_the_same_names_are_refused(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    with pytest.raises(MismatchError, match=r"part-00000\.parquet holds other blocks"):
        filled(model, tmp_path, blocks, blocks_per_shard=4)


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
    assert list(shards(tmp_path / "cut")) == ["part-00000.parquet"]
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(tmp_path / "cut")
    first = tmp_path / "cut" / "part-00000.parquet"
    written = first.stat().st_mtime_ns
    (tmp_path / "cut" / "part-00001.parquet.tmp-1").write_text("left by a killed process")

    again: list[int] = []
    cache = filled(model, tmp_path / "cut", blocks, on_tokens=again.append)
    first_ids = files.read_json(tmp_path / "cut" / "manifest.json")["shards"][0]["block_ids"]
    assert sum(again) == sum(LENGTHS) - sum(len(blocks[i]) for i in first_ids)  # the first shard is not made again
    assert first.stat().st_mtime_ns == written
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {*shards(tmp_path / "whole"), "manifest.json"}
    whole = Cache(tmp_path / "whole")
    assert all(equal(cache.read(i, tokens), whole.read(i, tokens)) for i, tokens in blocks.items())


def test_a_whole_cache_is_not_made_again(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    filled(model, tmp_path, blocks)

    def forbidden(num_tokens: int) -> None:
        raise Interrupted

    assert set(filled(model, tmp_path, blocks, on_tokens=forbidden).block_ids) == set(blocks)


# ---- damage


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
        with contextlib.suppress(SparseKDError):  # what a continued run asks
            assert Writer(tmp_path, cache.manifest["identity"], 400).has(1, inside)
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
    inside = cache.manifest["shards"][1]["block_ids"][0]
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
    manifest = files.read_json(tmp_path / "manifest.json")
    for path, content, shard in zip(paths, reversed(contents), manifest["shards"], strict=True):
        path.write_bytes(content)
        shard["bytes"] = len(content)
    files.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(MismatchError, match="block 0 was cached for other tokens"):
        Cache(tmp_path).read(0, blocks[0])


def test_a_missing_or_damaged_manifest(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(tmp_path / "nowhere")
    filled(model, tmp_path, blocks)
    path = tmp_path / "manifest.json"
    whole = files.read_json(path)
    needed = ("identity", "vocab_size", "shards")
    damaged: list[Any] = [{key: value for key, value in whole.items() if key != left} for left in needed]
    damaged += [[], None, {**whole, "shards": [{}]}, {**whole, "identity": {"top_k": "many"}}]
    for value in damaged:
        files.write_json(path, value)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            Cache(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Cache(tmp_path)
    filled(model, tmp_path, blocks)  # the shards are whole: only the manifest is made again
    assert files.read_json(path) == whole


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
    ("token", "log_prob", "log_tail", "message"),
    [
        (0, -1.0, -1.0, "do not sum to one"),
        (10, 0.0, -30.0, "outside the vocabulary of 10"),
        (-1, 0.0, -30.0, "outside the vocabulary of 10"),
        (1, 0.0, torch.nan, "are not finite"),
    ],
)
def test_what_is_not_a_distribution_over_the_vocabulary_is_refused(
    token: int, log_prob: float, log_tail: float, message: str, tmp_path: Path
) -> None:
    targets = Targets(
        torch.tensor([[token]]), torch.tensor([[log_prob]]), torch.tensor([log_tail]), torch.tensor([log_tail / 2])
    )
    with pytest.raises(DataError, match=f"teacher distributions of block 5 .*{message}|block 5 {message}"):
        Writer(tmp_path, {"top_k": 1}, 10).add(0, [5], [np.array([1, 2], np.int32)], [targets])
    assert shards(tmp_path) == {}


def test_a_disk_that_is_too_small_is_noticed_before_the_first_pass(make_model: Any, tmp_path: Path) -> None:
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.int32), shape=(10**16,), strides=(0,))  # takes no memory
    with pytest.raises(ResourceError, match="the teacher cache needs about"):
        filled(make_model("llama"), tmp_path, {0: huge})


# ---- widths


@pytest.mark.parametrize(("vocab_size", "width"), [(400, 2), (65_536, 2), (65_537, 4), (151_936, 4)])
def test_ids_take_two_or_four_bytes(vocab_size: int, width: int, tmp_path: Path) -> None:
    tokens = np.array([1, 2, 3], np.int32)
    ids = torch.tensor([[vocab_size - 1, 0], [5, vocab_size - 2]])
    log_probs = torch.tensor([[0.5, 0.25], [0.75, 0.125]]).log()
    targets = Targets(ids, log_probs, torch.tensor([0.25, 0.125]).log(), torch.tensor([2.0, 1.5]))
    writer = Writer(tmp_path, {"top_k": 2}, vocab_size)
    assert not writer.has(0, [3])
    writer.add(0, [3], [tokens], [targets])
    writer.finish()
    row = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()[0]
    assert len(row["ids"]) == ids.numel() * width
    assert sum(len(row[name]) for name in Targets._fields) == 2 * bytes_per_token(2, vocab_size)
    found = Cache(tmp_path).read(3, tokens)
    assert torch.equal(found.ids, ids)
    assert torch.allclose(found.log_probs, log_probs, atol=1e-3)
    assert torch.allclose(found.log_tail, targets.log_tail, atol=1e-3)
    assert torch.allclose(found.log_tail_half, targets.log_tail_half, atol=1e-3)


def test_a_shard_says_itself_what_it_was_made_from(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    manifest = files.read_json(tmp_path / "manifest.json")
    assert manifest["identity"] == identity(model, "t", "c", TOP_K)
    listed: list[int] = []
    for shard in manifest["shards"]:
        said = json.loads(pq.read_schema(tmp_path / shard["name"]).metadata[b"sparsekd"])
        assert said["identity"] == manifest["identity"]
        assert said["block_ids"] == shard["block_ids"]
        listed += shard["block_ids"]
    assert listed == sorted(blocks, key=lambda i: (len(blocks[i]), i))  # by length: nothing is padded


@pytest.mark.parametrize("key", ["codec", "alignment"])
def test_a_cache_of_another_format_is_refused(key: str, make_model: Any, tmp_path: Path) -> None:
    blocks = {0: np.arange(20, dtype=np.int32)}
    filled(make_model("llama"), tmp_path, blocks)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {key: "of the future"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=key):
        Cache(tmp_path)
