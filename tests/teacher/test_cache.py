"""The teacher cache: what is read is what the teacher said about these tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import TOP_K, filled, made_of, ragged, shards, sure
from transformers import PreTrainedModel

from sparsekd.errors import DataError, MismatchError, UsageError
from sparsekd.teacher import Cache, Samples, cache_teacher, distributions, top_k_distribution


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return sure(make_model)


@pytest.fixture(scope="module")
def blocks() -> dict[int, np.ndarray]:
    return ragged()


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
    [("corpus", {"corpus_fingerprint": "d"}), ("tokenizer", {"tokenizer_hash": "u"}), ("top_k", {"top_k": TOP_K - 1})],
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
        model, changes.get("tokenizer_hash", "t"), changes.get("corpus_fingerprint", "c"), changes.get("top_k", TOP_K)
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
