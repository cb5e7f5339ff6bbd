"""Codecs: what is decoded is what was stored, to the error that is stated; draws are unbiased."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekd.errors import UsageError
from sparsekd.teacher import CODECS, Samples, Targets, codec_for, top_k_distribution
from sparsekd.teacher.codecs import MAX_VOCAB
from sparsekd.teacher.selecting import sampled_distribution


def teacher(num_rows: int, vocab_size: int, top_k: int, sharpness: float = 3.0, seed: int = 0) -> Targets:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * sharpness
    return Targets(*(column.clone() for column in top_k_distribution(logits, top_k)))  # free of inference mode


def kl(decoded: Targets, stored: Targets) -> Tensor:
    """KL(decoded || stored) of the kept tokens and the tail, each rescaled to sum to one."""

    def normalised(targets: Targets) -> Tensor:
        entries = torch.cat([targets.log_probs, targets.log_tail[:, None]], -1).double()
        return entries - entries.logsumexp(-1, keepdim=True)

    q, p = normalised(decoded), normalised(stored)
    return (q.exp() * (q - p)).sum(-1)


@pytest.mark.parametrize("codec", ["q16", "q8"])
@pytest.mark.parametrize("top_k", [1, 2, 32, 256])
@pytest.mark.parametrize("vocab_size", [400, 65_536, 65_537, MAX_VOCAB])
def test_decoded_is_what_was_stored(codec: str, top_k: int, vocab_size: int) -> None:
    targets = teacher(3, min(vocab_size, 65_537), top_k)
    targets.ids[0, 0] = vocab_size - 1  # the largest id there is
    packer = codec_for(codec, top_k, vocab_size)
    planes = packer.encode(targets)
    assert list(planes) == packer.planes
    assert sum(map(len, planes.values())) == 3 * packer.bytes_per_token
    found = packer.decode(planes, 3)
    assert isinstance(found, Targets)
    assert torch.equal(found.ids, targets.ids)
    assert found.log_probs.shape == targets.log_probs.shape
    assert bool((found.log_probs.diff(dim=-1) <= 0).all())
    assert torch.allclose(found.log_tail, targets.log_tail, rtol=1e-3, atol=1e-6)
    assert torch.allclose(found.log_tail_half, targets.log_tail_half, rtol=1e-3, atol=1e-6)
    assert float(kl(found, targets).mean()) < 5e-5


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 20), st.integers(0, 1000))
def test_error_of_q8_stays_at_a_rank_and_does_not_add_up(sharpness: float, seed: int) -> None:
    """At each of 64 ranks, half a step of the largest drop so far at most: a value that came out too low makes the
    next one, if it is almost as high, come out as low."""
    targets = teacher(4, 600, 64, sharpness, seed)
    packer = codec_for("q8", 64, 600)
    found = packer.decode(packer.encode(targets), 4)
    assert isinstance(found, Targets)
    stored = -found.log_probs.diff(dim=-1)
    within = (-targets.log_probs.diff(dim=-1) < 30).cumprod(-1).bool()  # a larger drop is stored as the largest
    half_step = (math.expm1(math.log1p(32 / 0.2) / 255 / 2)) * (0.2 + stored)
    error = (found.log_probs - targets.log_probs).abs()[:, 1:]
    assert bool((error <= 1.001 * half_step.cummax(-1).values + 2e-3)[within].all())  # and fp16's of the first


def test_a_drop_larger_than_the_largest_is_made_up_for() -> None:
    log_probs = torch.tensor([[-1e-6, -50.0, -50.5, -51.0]])
    targets = Targets(torch.arange(4)[None], log_probs, torch.tensor([-30.0]), torch.tensor([-15.0]))
    packer = codec_for("q8", 4, 100)
    found = packer.decode(packer.encode(targets), 1)
    assert isinstance(found, Targets)
    assert found.log_probs[0, 1] == pytest.approx(-32, abs=0.01)
    assert found.log_probs[0, 2] == pytest.approx(-50.5, abs=0.3)
    assert found.log_probs[0, 3] == pytest.approx(-51, abs=0.02)


@pytest.mark.parametrize("codec", ["q16", "q8"])
def test_expected_error_is_the_error(codec: str) -> None:
    """At k = 32 of a sharp and a flat teacher: the forecast from decoded values against the KL that was paid."""
    packer = codec_for(codec, 32, 2000)
    for sharpness in (1.0, 3.0):
        targets = teacher(2000, 2000, 32, sharpness)
        found = packer.decode(packer.encode(targets), 2000)
        assert isinstance(found, Targets)
        expected = packer.expected_kl(found)
        assert expected is not None
        assert float(kl(found, targets).mean()) == pytest.approx(float(expected.mean()), rel=0.15)


def test_bytes_of_a_token() -> None:
    sizes = {name: [codec_for(name, None, v).bytes_per_token for v in (65_536, 65_537)] for name in CODECS}
    assert sizes == {"q16": [132, 164], "q8": [101, 133], "sampled": [48, 60]}


def test_a_vocabulary_that_ids_cannot_name() -> None:
    codec_for("q16", 32, MAX_VOCAB)
    with pytest.raises(UsageError, match=r"16,777,217 tokens: the teacher cache holds at most 16,777,216"):
        codec_for("q16", 32, MAX_VOCAB + 1)


def test_a_plane_of_another_size_is_refused() -> None:
    packer = codec_for("q16", 8, 400)
    planes = packer.encode(teacher(5, 400, 8))
    planes["ids_0"] = planes["ids_0"][:-1]
    with pytest.raises(ValueError, match="reshape"):
        packer.decode(planes, 5)


# ---- draws


def draws(logits: Tensor, num_samples: int, count: int, seed: int = 0) -> Samples:
    """`count` independent draws from one row of logits."""
    uniforms = torch.from_numpy(np.random.default_rng(seed).random(count))
    return sampled_distribution(logits.expand(count, -1), num_samples, uniforms)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 10.0])
def test_draws_are_all_different_and_weigh_one(sharpness: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1)) * sharpness
    found = draws(logits, 12, 500)
    assert found.ids.shape == (500, 12)
    assert all(len(set(row)) == 12 for row in found.ids.tolist())
    assert torch.allclose(found.log_weights.double().exp().sum(-1), torch.ones(500, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_the_mean_weight_of_a_token_is_its_probability(sharpness: float) -> None:
    """Each token within 5 standard errors, those that are hardly ever drawn in groups; and better than plain draws."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * sharpness
    p, count = logits.double().softmax(-1), 20_000
    found = draws(logits, 12, count)
    t = float(found.log_weights[0, -1].double().exp())  # the weight of a token that is not certain
    weights = torch.zeros(count, 300, dtype=torch.float64).scatter_(-1, found.ids, found.log_weights.double().exp())
    bound = 5 * (p * t / count).sqrt() + 1e-6  # p t is at least the variance, p (t - p) or 0
    often = count * p / t > 10
    assert int(often.sum()) > 100
    error = weights.mean(0) - p
    assert bool((error.abs() <= bound)[often].all())
    assert float(error[~often].sum().abs()) <= 5 * float((p[~often].sum() * t / count) ** 0.5) + 1e-6
    plain = (1 - (p**2).sum()) / 12  # variance of the mean of 12 independent draws, all tokens together
    assert float(weights.var(0).sum()) < plain


def test_tokens_that_are_certain_keep_their_own_probability() -> None:
    p = torch.tensor([0.6, 0.3, *[0.001] * 100]).double()
    found = draws(p.log(), 4, 1000)
    assert found.ids[:, :2].tolist() == [[0, 1]] * 1000
    assert torch.allclose(found.log_weights[:, :2].exp().double(), p[:2].expand(1000, 2), atol=1e-6)
    assert torch.allclose(found.log_weights[:, 2:].exp(), torch.tensor(0.05), atol=1e-6)


def test_one_token_that_has_all_the_mass() -> None:
    found = draws(torch.tensor([500.0, *range(50)]), 12, 10)
    assert found.ids[:, 0].tolist() == [0] * 10
    assert torch.allclose(found.log_weights.exp().sum(-1), torch.ones(10))


def test_samples_survive_the_codec() -> None:
    found = draws(torch.randn(70_000, generator=torch.Generator().manual_seed(3)) * 3, 12, 50)
    packer = codec_for("sampled", None, 70_000)
    decoded = packer.decode(packer.encode(found), 50)
    assert isinstance(decoded, Samples)
    assert torch.equal(decoded.ids, found.ids)
    assert torch.allclose(decoded.log_weights, found.log_weights, atol=6e-3)
    assert torch.allclose(decoded.log_weights.exp().sum(-1), torch.ones(50))
