"""Several teachers as one: the mean of their distributions, wherever a single teacher may stand."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import sharpened
from torch import Tensor
from training import OPTIONS, data
from transformers import PreTrainedModel

from sparsekd import distillation
from sparsekd.errors import DataError, MismatchError, SparseKDError, UsageError
from sparsekd.models import document_positions
from sparsekd.teacher import Cache, Mixture, Online, Samples, Targets, codec_for, distributions, fill
from sparsekd.teacher.filling import identity

VOCAB = 400
Mean = Literal["arithmetic", "geometric"]
MADE_FROM: dict[str, Any] = {"tokenizer_hash": "t", "corpus_fingerprint": "c"}


@pytest.fixture(scope="module")
def teachers(make_model: Callable[..., PreTrainedModel]) -> list[PreTrainedModel]:
    """Three that disagree: another hidden size, another architecture, and a padded vocabulary."""
    made = [
        make_model("llama"),
        make_model("llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3),
        make_model("qwen3", vocab_size=512),
    ]
    return [sharpened(model) for model in made]


def tokens(count: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (count, 12), generator=torch.Generator().manual_seed(0))


def expected(
    models: list[PreTrainedModel],
    weights: list[float],
    batch: Tensor,
    vocab_size: int,
    mean: Mean = "arithmetic",
    **more: Any,
) -> Tensor:
    """The definition, from the hidden states on in float64."""
    with torch.no_grad():
        hidden = [model.get_decoder()(batch, use_cache=False, **more).last_hidden_state[:, :-1] for model in models]
        heads: list[Any] = [model.get_output_embeddings() for model in models]
        logits = [h.double() @ head.weight[:vocab_size].double().T for h, head in zip(hidden, heads, strict=True)]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    each = torch.stack([z.softmax(-1) for z in logits])
    shares = shares[:, None, None, None]
    if mean == "arithmetic":
        return (shares * each).sum(0)
    product = (each**shares).prod(0)
    return product / product.sum(-1, keepdim=True)


def require_same(found: Targets, probabilities: Tensor, tolerance: float) -> None:
    """Kept tokens, tail and the tail's sum of square roots are those of `probabilities`, N x V."""
    exact = probabilities.log()
    kept = exact.gather(-1, found.ids)
    best = exact.topk(found.ids.shape[-1]).values
    torch.testing.assert_close(kept, best, rtol=0, atol=tolerance)  # which of two equally likely ones is kept is open
    torch.testing.assert_close(found.log_probs.double(), kept, rtol=0, atol=tolerance)
    rest = exact.scatter(-1, found.ids, -torch.inf)
    torch.testing.assert_close(found.log_tail.double(), rest.logsumexp(-1), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.log_tail_half.double(), (rest / 2).logsumexp(-1), rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    vocab_size=st.sampled_from([None, 400, 300]),
    mean=st.sampled_from(["arithmetic", "geometric"]),
)
def test_the_mean_of_the_distributions(
    weights: list[float], vocab_size: int | None, mean: Mean, teachers: list[PreTrainedModel]
) -> None:
    """Whatever the padding of one and the cut of all: each teacher is normalised over the tokens that count. The mean
    is that of all of these, and only then are the likeliest kept."""
    found = distributions(Mixture(teachers, weights, mean), tokens(), 8, vocab_size)
    exact = expected(teachers, weights, tokens(), vocab_size or VOCAB, mean)
    for block, probabilities in zip(found, exact, strict=True):
        require_same(block, probabilities, 1e-4)


def test_the_two_means_differ_and_a_geometric_one_of_geometric_ones_is_one(teachers: list[PreTrainedModel]) -> None:
    """So an anchor keeps its weight beside whatever generations are mixed with it."""
    arithmetic, geometric = (expected(teachers, [1.0, 1.0, 2.0], tokens(), VOCAB, mean) for mean in get_args(Mean))
    assert float((arithmetic - geometric).abs().max()) > 0.01
    pair = expected(teachers[:2], [1.0, 1.0], tokens(), VOCAB, "geometric")
    third = expected(teachers[2:], [1.0], tokens(), VOCAB)
    nested = (pair * third).sqrt()
    torch.testing.assert_close(nested / nested.sum(-1, keepdim=True), geometric)


def test_the_weights_matter(teachers: list[PreTrainedModel]) -> None:
    """That the test above could fail: the teachers disagree, and so do mixtures of other weights."""
    one, other = (expected(teachers, weights, tokens(), VOCAB) for weights in ([1.0, 1.0, 1.0], [1.0, 2.0, 1.0]))
    assert float((one - other).abs().max()) > 0.01
    with pytest.raises(AssertionError):
        require_same(distributions(Mixture(teachers, [1.0, 2.0, 1.0]), tokens(), 8)[0], one[0], 1e-4)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_mixture_of_one_is_that_one(mean: Mean, teachers: list[PreTrainedModel]) -> None:
    alone = distributions(teachers[0], tokens(), 8)
    for found, block in zip(distributions(Mixture(teachers[:1], [0.3], mean), tokens(), 8), alone, strict=True):
        assert torch.equal(found.ids, block.ids)
        for column, other in zip(found[1:], block[1:], strict=True):
            torch.testing.assert_close(column, other, rtol=0, atol=2e-6)


def test_half_precision_teachers_are_mixed_in_float32(teachers: list[PreTrainedModel]) -> None:
    halves = [copy.deepcopy(model).bfloat16() for model in teachers]
    found = distributions(Mixture(halves, [1.0, 1.0, 2.0]), tokens(), 8)
    assert found[0].log_probs.dtype == torch.float32
    require_same(found[0], expected(halves, [1.0, 1.0, 2.0], tokens(), VOCAB)[0], 1e-4)


def test_packed_documents_do_not_see_each_other(teachers: list[PreTrainedModel]) -> None:
    batch = tokens()
    batch[:, 5] = 0
    positions = document_positions(batch, separator=0)
    mixture, weights = Mixture(teachers, [1.0, 2.0, 1.0]), [1.0, 2.0, 1.0]
    apart = distributions(mixture, batch, 8, separator=0)
    require_same(apart[1], expected(teachers, weights, batch, VOCAB, position_ids=positions)[1], 1e-4)
    assert not torch.equal(apart[1].ids, distributions(mixture, batch, 8)[1].ids)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("codec", ["q16", "sampled"])
def test_a_cache_of_a_mixture(codec: str, mean: Mean, teachers: list[PreTrainedModel], tmp_path: Path) -> None:
    weights = [3.0, 1.0, 1.0]
    mixture = Mixture(teachers, weights, mean)
    blocks = {number: row.numpy().astype(np.int32) for number, row in enumerate(tokens(5))}
    cache = fill(mixture, tmp_path, blocks, codec=codec, top_k=8, **MADE_FROM)
    assert cache is not None
    assert cache.vocab_size == VOCAB
    probabilities = expected(teachers, weights, tokens(5), VOCAB, mean)
    for number, block in blocks.items():
        found = cache.read(number, block)
        if isinstance(found, Samples):  # a weight is at least the token's own probability, and all sum to one
            own = probabilities[number].gather(-1, found.ids)
            assert bool((found.log_weights.double().exp() > own * 0.998).all())
            continue
        require_same(found, probabilities[number], 4e-3)  # rounded to fp16
    again = Cache(tmp_path, identity(mixture, "t", "c", codec_for(codec, 8, VOCAB)))
    assert again.identity == cache.identity


def test_who_is_mixed_and_how_is_the_identity(teachers: list[PreTrainedModel], tmp_path: Path) -> None:
    codec = codec_for("q16", 8, VOCAB)
    single = [identity(model, "t", "c", codec) for model in teachers]
    assert "weights" not in single[0]
    mixed = identity(Mixture(teachers, [1.0, 1.0, 2.0]), "t", "c", codec)
    assert mixed["weights"] == [0.25, 0.25, 0.5]
    assert mixed["teacher"] == [of["teacher"] for of in single]
    assert mixed["config"] == [of["config"] for of in single]
    assert mixed["dtype"] == ["float32"] * 3
    assert mixed == identity(Mixture(teachers, [2.0, 2.0, 4.0]), "t", "c", codec)
    geometric = identity(Mixture(teachers, [1.0, 1.0, 2.0], "geometric"), "t", "c", codec)
    assert geometric == mixed | {"mixture": "geometric"} and "mixture" not in mixed  # as earlier caches have it
    blocks = {0: tokens()[0].numpy().astype(np.int32)}
    fill(Mixture(teachers, [1.0, 1.0, 2.0]), tmp_path, blocks, top_k=8, **MADE_FROM)
    for other, field in (
        (Mixture(teachers, [1.0, 1.0, 3.0]), "weights"),
        (Mixture([*teachers[:2], teachers[0]], [1.0, 1.0, 2.0]), "config"),
        (Mixture(teachers, [1.0, 1.0, 2.0], "geometric"), "mixture"),
        (teachers[0], "config"),
    ):
        with pytest.raises(MismatchError, match=f"was made with {field} = ") as caught:
            fill(other, tmp_path, blocks, top_k=8, **MADE_FROM)
        assert "\n" not in str(caught.value)


def test_training_from_a_mixture_that_is_asked_at_every_step(
    teacher: PreTrainedModel, teachers: list[PreTrainedModel], new_student: Any, blocks: Tensor, tmp_path: Path
) -> None:
    """Online and cache agree; the anchor pulls the loss away from what one teacher alone would ask."""
    mixture = Mixture([teacher, teachers[1]], [1.0, 1.0])
    online = Online(mixture, 8)
    assert online.vocab_size == VOCAB
    by_id = {number: block.numpy().astype(np.int32) for number, block in enumerate(blocks)}
    cache = fill(mixture, tmp_path, by_id, top_k=8, **MADE_FROM)
    options = replace(OPTIONS, alpha=1.0)
    measured = [distillation.measure(new_student(), data(blocks, of), options).kd for of in (online, cache)]
    assert measured[0] == pytest.approx(measured[1], rel=2e-3)
    assert measured[0] != pytest.approx(
        distillation.measure(new_student(), data(blocks, Online(teacher, 8)), options).kd, rel=0.05
    )
    history = distillation.train(new_student(), data(blocks, online, (0, 1, 2, 3)), options)
    assert history.validations[-1].kd < 0.9 * history.validations[0].kd


def test_the_smallest_context_holds(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    mixture = Mixture([make_model("llama"), make_model("llama", max_position_embeddings=16)], [1.0, 1.0])
    with pytest.raises(DataError, match=r"block 4 has 17 tokens, the model's context is 16"):
        fill(mixture, tmp_path, {4: np.arange(17, dtype=np.int32)}, **MADE_FROM)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_weighs_nothing(weight: float, teachers: list[PreTrainedModel]) -> None:
    with pytest.raises(UsageError, match=rf"the weight of teacher 2 is {weight}: expected a number above 0"):
        Mixture(teachers[:2], [1.0, weight])


def test_teachers_that_cannot_be_mixed(
    make_model: Callable[..., PreTrainedModel], teachers: list[PreTrainedModel]
) -> None:
    stranger = make_model("llama", vocab_size=400 + 1024)
    refused: list[tuple[list[PreTrainedModel], list[float], type[SparseKDError], str]] = [
        ([], [], UsageError, "a mixture of 0 teachers with 0 weights"),
        (teachers, [1.0], UsageError, "a mixture of 3 teachers with 1 weights"),
        (
            [*teachers[:2], stranger],
            [1.0, 1.0, 1.0],
            MismatchError,
            "teacher 3 has a vocabulary of 1424 tokens, teacher 1 one of 400: expected models of one family",
        ),
    ]
    for models, weights, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            Mixture(models, weights)
        assert "\n" not in str(caught.value)
    Mixture([teachers[0], make_model("llama", vocab_size=400 + 1023)], [1.0, 1.0])
