"""The teacher cache: what is read is what the teacher said about these tokens, or an error that names the file."""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

from sparsekd import files, records
from sparsekd.errors import DataError, MismatchError, ResourceError, SparseKDError, UsageError
from sparsekd.teacher.cache import Cache, Part, Samples, Targets, Writer, merge
from sparsekd.teacher.codecs import codec_for
from sparsekd.teacher.filling import cache_teacher, distributions, fill, identity, top_k_distribution

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
    fill(model, folder, blocks, **{**options, **changes})
    return Cache(folder)


def made_of(model: PreTrainedModel, tokenizer: str = "t", corpus: str = "c", top_k: int = TOP_K) -> dict[str, Any]:
    return identity(model, tokenizer, corpus, codec_for("q16", top_k, 400))


def equal(a: Targets, b: Targets) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def targets(token: int, log_prob: float, log_tail: float) -> Targets:
    return Targets(torch.tensor([[token]]), *map(torch.tensor, ([[log_prob]], [log_tail], [0.0])))


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
        half = (expected / 2).scatter(-1, found.ids, -torch.inf).logsumexp(-1)
        assert torch.allclose(found.log_tail_half.double(), half, rtol=1e-3, atol=1e-4)
    assert float(expected.max(-1).values.exp().max()) > 0.1  # not a near-uniform teacher, where anything fits


def test_top_k_distribution_sums_the_tail_itself() -> None:
    logits = torch.tensor([[0.0, -20.0, -21.0, -19.0], [0.0, -90.0, -90.0, -80.0]])
    found = top_k_distribution(logits, 2)
    assert found.ids.tolist() == [[0, 3], [0, 3]]
    expected = logits[0, 1:3].double().logsumexp(-1) - logits[0].double().logsumexp(-1)
    assert found.log_tail[0].item() == pytest.approx(expected.item(), rel=1e-6)  # 1 minus the head would be 0 in fp32
    assert found.log_tail[1].item() == -30.0
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
    wanted = made_of(
        model, changes.get("tokenizer", "t"), changes.get("corpus_fingerprint", "c"), changes.get("top_k", TOP_K)
    )
    with pytest.raises(MismatchError, match=f"was made with {key} = "):
        Cache(tmp_path, wanted)
    Cache(tmp_path, made_of(model))


def test_another_model_is_refused(
    model: PreTrainedModel, make_model: Callable[[str], PreTrainedModel], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path, blocks)
    other = make_model("llama")  # the same architecture, other weights
    with pytest.raises(MismatchError, match="was made with teacher = "):
        filled(other, tmp_path, blocks)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_cache_goes_on_with_another_number_of_blocks_to_a_shard(
    size: int, model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path / "first", blocks)
    found = filled(model, tmp_path / "first", blocks, blocks_per_shard=size)
    expected = filled(model, tmp_path / "second", blocks, blocks_per_shard=size)
    assert shards(tmp_path / "first") == shards(tmp_path / "second")
    for i, block in blocks.items():
        assert all(map(torch.equal, found.read(i, block), expected.read(i, block)))


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
    inside = cache.shards[1]["block_ids"][0]
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


# ---- codecs


@pytest.mark.parametrize("codec", ["q16", "q8", "sampled"])
def test_every_codec_goes_to_disk_and_back(
    codec: str, model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks, codec=codec)
    assert cache.codec.name == codec
    for block_id, tokens in blocks.items():
        found = cache.read(block_id, tokens)
        (expected,) = distributions(model, torch.from_numpy(tokens.astype(np.int64))[None], TOP_K)
        if isinstance(found, Samples):
            assert codec == "sampled"
            assert torch.allclose(found.log_weights.exp().sum(-1), torch.ones(len(tokens) - 1))
        else:
            assert torch.equal(found.ids, expected.ids)
            assert torch.allclose(found.log_probs, expected.log_probs, atol=0.05)


def test_draws_are_a_function_of_seed_and_block(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    for name, changes in (("a", {}), ("b", {"batch_size": 1, "blocks_per_shard": 100}), ("c", {"seed": 7})):
        filled(model, tmp_path / name, blocks, codec="sampled", **changes)
    ids = {name: {i: Cache(tmp_path / name).read(i, blocks[i]).ids for i in blocks} for name in "abc"}
    assert all(torch.equal(ids["a"][i], ids["b"][i]) for i in blocks)
    assert any(not torch.equal(ids["a"][i], ids["c"][i]) for i in blocks)
    with pytest.raises(MismatchError, match="seed = 42, now asked for 7"):
        filled(model, tmp_path / "a", blocks, codec="sampled", seed=7)


def test_padding_of_the_embeddings_takes_no_probability(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path
) -> None:
    padded = make_model("llama", vocab_size=512)
    tokens = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = cache_teacher(padded, tokenizer, tokens, tmp_path)
    assert cache.vocab_size == len(tokenizer) == 400
    found = cache.read(0, tokens[0].numpy())
    with torch.no_grad():
        expected = padded(tokens[:1]).logits[0, :-1, :400].log_softmax(-1).topk(32)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.log_probs, expected.values, atol=1e-2)


def test_a_vocabulary_larger_than_ids_can_name_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    blocks = {0: np.arange(20, dtype=np.int32)}
    with pytest.raises(UsageError, match=r"has 16,777,217 tokens: the teacher cache holds at most 16,777,216"):
        filled(model, tmp_path, blocks, vocab_size=2**24 + 1)


def test_a_block_longer_than_the_context_is_refused(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    short = make_model("llama", max_position_embeddings=16)
    with pytest.raises(DataError, match=r"block 4 has 17 tokens, the model's context is 16: lower corpus\.seq_len"):
        filled(short, tmp_path, {3: np.arange(16, dtype=np.int32), 4: np.arange(17, dtype=np.int32)})
    filled(short, tmp_path, {3: np.arange(16, dtype=np.int32)})


def test_another_config_of_the_same_weights_is_refused(
    make_model: Callable[..., PreTrainedModel], blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(make_model("llama"), tmp_path, blocks)
    with pytest.raises(MismatchError, match="was made with config = "):
        filled(make_model("llama", rms_norm_eps=1e-3), tmp_path, blocks)


# ---- several processes


def test_parts_unite_to_the_cache_that_one_process_writes(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    filled(model, tmp_path / "one", blocks)
    folder = tmp_path / "three"
    for number in (3, 1):
        assert fill_part(model, folder, blocks, Part(number, 3)) is None
    with pytest.raises(DataError, match=r"shard 2/3 is not finished: run sparsekd cache with --shard 2/3"):
        merge(folder, blocks)
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        Cache(folder)
    fill_part(model, folder, blocks, Part(2, 3))
    with pytest.raises(DataError, match=r"lacks 1 of the 11 blocks that are needed, the first is block 1000"):
        merge(folder, [*blocks, 1000])
    for _ in range(2):  # merged once more, it stays what it is
        assert set(merge(folder, blocks).block_ids) == set(blocks)
    assert contents(folder) == contents(tmp_path / "one")


def test_parts_of_different_things_do_not_unite(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds no finished shard"):
        tmp_path.mkdir(exist_ok=True)
        merge(tmp_path, blocks)
    fill_part(model, tmp_path, blocks, Part(1, 2))
    fill_part(model, tmp_path, blocks, Part(2, 2), corpus_fingerprint="d")
    with pytest.raises(MismatchError, match=r"manifest-2-of-2\.json was made with corpus = d, now asked for c"):
        merge(tmp_path, blocks)
    fill_part(model, tmp_path, blocks, Part(3, 4))
    with pytest.raises(UsageError, match="manifests of 2 and of 4 shards"):
        merge(tmp_path, blocks)


def test_a_part_lost_after_it_was_finished_is_named(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    for number in (1, 2):
        fill_part(model, tmp_path, blocks, Part(number, 2))
    (tmp_path / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet is damaged: 0 bytes"):
        merge(tmp_path, blocks)
    fill_part(model, tmp_path, blocks, Part(2, 2))
    merge(tmp_path, blocks)


def test_two_writers_of_one_part(model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path) -> None:
    with Writer.open(tmp_path, made_of(model), Part(2, 3)):
        with pytest.raises(UsageError, match=r"part 2/3 of the cache .* is in use by process \d+"):
            fill_part(model, tmp_path, blocks, Part(2, 3))
        (tmp_path / "part-00001.parquet.tmp-1").write_text("at work")
        fill_part(model, tmp_path, blocks, Part(1, 3))  # another part is free, and leaves the others' files alone
        assert (tmp_path / "part-00001.parquet.tmp-1").exists()
    fill_part(model, tmp_path, blocks, Part(2, 3))
    assert not (tmp_path / "part-00001.parquet.tmp-1").exists()
    assert not list(tmp_path.glob("*.lock"))


def fill_part(
    model: PreTrainedModel, folder: Path, blocks: dict[int, np.ndarray], part: Part, corpus_fingerprint: str = "c"
) -> Cache | None:
    options = {"tokenizer": "t", "corpus_fingerprint": corpus_fingerprint, "top_k": TOP_K, "blocks_per_shard": 3}
    return fill(model, folder, blocks, **options, batch_size=2, part=part)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- foreign


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


def test_a_cache_that_covers_too_little_is_refused(
    model: PreTrainedModel, blocks: dict[int, np.ndarray], tmp_path: Path
) -> None:
    cache = filled(model, tmp_path, blocks)
    cache.require(blocks)
    with pytest.raises(DataError, match=r"lacks 2 of the 12 blocks that are needed, the first is block 5"):
        cache.require([*blocks, 5, 1000])


def test_many_shards_are_read_without_holding_them_open(model: PreTrainedModel, tmp_path: Path) -> None:
    blocks = {i: np.arange(8, dtype=np.int32) + i for i in range(80)}
    cache = filled(model, tmp_path, blocks, blocks_per_shard=1)
    for block_id in [*blocks, *blocks]:
        cache.read(block_id, blocks[block_id])
    opened = [path for path in Path("/proc/self/fd").iterdir() if str(path.resolve()).startswith(str(tmp_path))]
    assert len(opened) <= 64


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
