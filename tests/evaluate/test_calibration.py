"""Calibration and agreement against brute force in float64 and against cases with known answers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import sparsekd
from sparsekd.corpus import encode
from sparsekd.errors import DataError
from sparsekd.evaluate import measure
from sparsekd.evaluate.agreement import divergences
from sparsekd.evaluate.calibration import Confidences, confidences
from sparsekd.evaluate.windows import (
    Estimate,
    Window,
    choose,
    equal_mass_bins,
    mean_and_error,
    predicted_in,
    split,
)

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards mix bold potions quietly in a dim cave. " * 6
CONTEXT, STRIDE = 32, 20


@pytest.fixture
def model(make_model: Any) -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def other(make_model: Any) -> PreTrainedModel:
    changed = make_model("llama")
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.mlp.down_proj.weight.mul_(3.0)
        changed.get_output_embeddings().weight.mul_(20.0)  # confident, so that the calibration error is not tiny
    return changed


def probabilities(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """(log-probabilities in float64, labels, predictions a window) of what the strict protocol counts."""
    rows, labels, counts, predicted = [], [], [], 1
    for start in range(0, len(ids), STRIDE):
        window = torch.tensor(ids[start : start + CONTEXT])
        with torch.no_grad():
            log_p = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        fresh = max(predicted, start + 1) - start - 1
        rows.append(log_p[fresh:])
        labels.append(window[1 + fresh :])
        counts.append(len(rows[-1]))
        predicted = start + len(window)
        if predicted == len(ids):
            break
    return torch.cat(rows), torch.cat(labels), counts


def test_calibration_equals_brute_force(other: PreTrainedModel, tokenizer: Any) -> None:
    found = measure({"it": other}, tokenizer, TEXT, context=CONTEXT, stride=STRIDE, batch_size=3)["it"].calibration
    log_p, labels, counts = probabilities(other, encode(tokenizer, TEXT))
    p = log_p.exp()
    confidence, likeliest = p.max(-1)
    right = (likeliest == labels).double()
    one_hot = torch.nn.functional.one_hot(labels, p.shape[1])
    assert sum(b.num_tokens for b in found.bins) == len(labels) == len(encode(tokenizer, TEXT)) - 1
    assert found.brier.value == pytest.approx(float(((p - one_hot) ** 2).sum(-1).mean()), rel=1e-5)
    assert found.entropy.value == pytest.approx(float(torch.special.entr(p).sum(-1).mean()), rel=1e-5)
    assert found.confidence.value == pytest.approx(float(confidence.mean()), rel=1e-5)
    assert found.accuracy.value == pytest.approx(float(right.mean()), rel=1e-12)
    assert found.overconfidence.value == pytest.approx(float((confidence - right).mean()), rel=1e-5)
    order = confidence.argsort()
    parts = [order[i] for i in np.array_split(np.arange(len(order)), 15)]
    gaps = [len(i) * abs(float(right[i].mean() - confidence[i].mean())) for i in parts]
    # the text repeats, so some confidences tie and their bins differ by a few tokens
    assert found.expected_calibration_error == pytest.approx(sum(gaps) / len(order), rel=0.1)
    sums = [float(part.sum()) for part in (confidence - right).split(counts)]
    assert found.overconfidence.standard_error == pytest.approx(mean_and_error(sums, counts).standard_error, rel=1e-4)
    assert found.overconfidence.standard_error > 0


def test_calibration_of_a_known_case() -> None:
    """Sure of token 0 with 0.8 and right in 3 of 4, and sure of token 1 with 0.6 and right in 1 of 2."""
    collected = Confidences()
    for start, (p, labels) in enumerate([([0.8, 0.1, 0.1], [0, 0, 0, 1]), ([0.2, 0.6, 0.2], [1, 2])]):
        logits = torch.tensor([p] * len(labels)).log()
        collected.add(predicted_in(Window(start, start + len(labels), 0), logits, torch.tensor(labels)))
    found = collected.result()
    assert [(b.num_tokens, b.accuracy) for b in found.bins] == [(2, 0.5), (4, 0.75)]
    assert found.expected_calibration_error == pytest.approx((2 * 0.1 + 4 * 0.05) / 6, rel=1e-5)
    assert found.overconfidence.value == pytest.approx((4 * 0.8 + 2 * 0.6 - 4) / 6, rel=1e-5)
    brier = 3 * (0.04 + 0.02) + (0.64 + 0.81 + 0.01) + (0.04 + 0.16 + 0.04) + (0.04 + 0.36 + 0.64)
    assert found.brier.value == pytest.approx(brier / 6, rel=1e-5)


def test_a_perfectly_calibrated_model_has_a_small_error() -> None:
    """Labels drawn from the prediction itself: the error is chance alone, and entropy equals the loss."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(40_000, 7)
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    collected = Confidences()
    for window in split(40_001, 101, 100):
        rows = slice(window.start, window.end - 1)
        collected.add(predicted_in(window, logits[rows].clone(), labels[rows]))
    found = collected.result()
    nll = torch.nn.functional.cross_entropy(logits, labels)
    assert found.expected_calibration_error < 0.01
    assert abs(found.overconfidence.value) < 3 * found.overconfidence.standard_error
    assert abs(found.entropy.value - float(nll)) < 0.02


def test_statistics_do_not_depend_on_the_chunk(monkeypatch: Any) -> None:
    logits, labels = torch.randn(300, 50), torch.randint(50, (300,))

    def statistics() -> list[torch.Tensor]:
        found = predicted_in(Window(0, 301, 0), logits.clone(), labels)
        divergence = divergences(found.log_probs, found.log_probs.flip(0))
        return [found.log_probs, confidences(*found[1:]), divergence]

    whole = statistics()
    for module in ("windows", "calibration", "agreement"):
        monkeypatch.setattr(f"sparsekd.evaluate.{module}.CHUNK", 7)
    for found, expected in zip(statistics(), whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_agreement_equals_brute_force(model: PreTrainedModel, other: PreTrainedModel, tokenizer: Any) -> None:
    pair = {"dense": model, "small": other}
    found = measure(pair, tokenizer, TEXT, teacher="dense", context=CONTEXT, stride=STRIDE, batch_size=3)
    assert found["dense"].agreement is None
    agreement = found["small"].agreement
    assert agreement is not None
    ids = encode(tokenizer, TEXT)
    log_p, labels, counts = probabilities(model, ids)
    log_q, _, _ = probabilities(other, ids)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    assert agreement.kl.value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert agreement.top1.value == pytest.approx(float(same.mean()), rel=1e-12)
    by_window = [float(part.sum()) for part in kl.split(counts)]
    assert agreement.kl.standard_error == pytest.approx(mean_and_error(by_window, counts).standard_error, rel=1e-4)
    frequency = torch.bincount(torch.tensor(ids))[labels]
    assert sum(b.num_tokens for b in agreement.by_frequency) == len(labels)
    assert len(agreement.by_frequency) > 1
    for part in agreement.by_frequency:
        members = (frequency >= part.least) & (frequency <= part.most)
        assert part.num_tokens == int(members.sum())
        assert part.kl.value == pytest.approx(float(kl[members].mean()), rel=1e-5)
        assert part.top1.value == pytest.approx(float(same[members].mean()), rel=1e-12)


def test_agreement_in_chosen_windows_is_that_of_their_tokens(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer: Any
) -> None:
    options = {"teacher": "dense", "context": CONTEXT, "stride": STRIDE}
    agreement = measure({"dense": model, "small": other}, tokenizer, TEXT, max_tokens=90, **options)["small"].agreement
    assert agreement is not None
    ids = encode(tokenizer, TEXT)
    log_p, labels, counts = probabilities(model, ids)
    kl = (log_p.exp() * (log_p - probabilities(other, ids)[0])).sum(-1).split(counts)
    windows = split(len(ids), CONTEXT, STRIDE)
    places = [windows.index(window) for window in choose(windows, 90)]
    assert 1 < len(places) < len(windows)
    assert agreement.kl.value == pytest.approx(float(torch.cat([kl[place] for place in places]).mean()), rel=1e-5)
    came = torch.cat([labels.split(counts)[place] for place in places])
    frequency = torch.bincount(torch.tensor(ids))[came]
    for part in agreement.by_frequency:
        assert part.num_tokens == int(((frequency >= part.least) & (frequency <= part.most)).sum())


def test_measuring_side_by_side_changes_no_perplexity(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer: Any
) -> None:
    options = {"context": CONTEXT, "stride": STRIDE, "batch_size": 2, "max_tokens": 150}
    both = measure({"dense": model, "small": other}, tokenizer, TEXT, teacher="dense", **options)
    for name, each in (("dense", model), ("small", other)):
        assert both[name].perplexity == sparsekd.perplexity(each, tokenizer, TEXT, **options)


def test_a_model_agrees_with_itself(model: PreTrainedModel, tokenizer: Any) -> None:
    found = measure({"dense": model, "same": model}, tokenizer, TEXT, teacher="dense")["same"].agreement
    assert found is not None
    assert found.top1.value == 1
    assert abs(found.kl.value) < 1e-6


def test_vocabularies_of_two_sizes_are_refused(model: PreTrainedModel, make_model: Any, tokenizer: Any) -> None:
    smaller = make_model("llama", vocab_size=300)
    with pytest.raises(DataError, match="one vocabulary, found sizes dense 400, smaller 300"):
        measure({"dense": model, "smaller": smaller}, tokenizer, TEXT, teacher="dense")


def test_padding_of_the_vocabulary_changes_nothing(model: PreTrainedModel, make_model: Any, tokenizer: Any) -> None:
    padded = make_model("llama", vocab_size=464)
    with torch.no_grad():
        for name, weight in padded.state_dict().items():
            weight[: len(model.get_parameter(name))] = model.get_parameter(name)
        padded.get_output_embeddings().weight[400:] *= 100.0  # what padding says is of no consequence
    pair = {"dense": model, "padded": padded}
    found = measure(pair, tokenizer, TEXT, teacher="dense", context=CONTEXT, stride=STRIDE)
    assert found["padded"].perplexity == found["dense"].perplexity
    assert found["padded"].perplexity == sparsekd.perplexity(padded, tokenizer, TEXT, context=CONTEXT, stride=STRIDE)
    assert found["padded"].calibration == found["dense"].calibration
    agreement = found["padded"].agreement
    assert agreement is not None
    assert agreement.top1.value == 1 and abs(agreement.kl.value) < 1e-6


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 20))
def test_bins_hold_ranges_of_values_and_equal_values_stay_together(values: list[int], num_bins: int) -> None:
    bins = equal_mass_bins(np.array(values), num_bins)
    assert bins.min() >= 0 and bins.max() < num_bins
    by_value = sorted(zip(values, bins.tolist(), strict=True))
    assert [b for _, b in by_value] == sorted(b for _, b in by_value)
    assert len({b for _, b in by_value}) <= len(set(values))
    assert all(len({b for v, b in by_value if v == value}) == 1 for value in set(values))


@given(st.integers(1, 300), st.integers(1, 20))
def test_bins_of_distinct_values_differ_by_one_member(count: int, num_bins: int) -> None:
    members = np.bincount(equal_mass_bins(np.arange(count), num_bins), minlength=num_bins)
    assert members.max() - members.min() <= 1


def test_the_error_of_a_mean_is_that_of_its_windows() -> None:
    """For windows of one size the ratio estimator is the usual standard error of the windows' means."""
    means = [1.0, 2.0, 4.0, 9.0]
    found = mean_and_error([10 * m for m in means], [10] * 4)
    assert found.value == 4.0
    assert found.standard_error == pytest.approx(float(np.std(means, ddof=1)) / math.sqrt(4), rel=1e-12)


def test_the_error_of_tokens_that_are_all_in_one_window_is_unknown() -> None:
    """Whatever the number of windows without them: they are a sample of one."""
    assert mean_and_error([8.0], [4]) == mean_and_error([0.0, 8.0, 0.0], [0, 4, 0]) == Estimate(2.0, None)
