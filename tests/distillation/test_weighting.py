"""Weights of each position's KD: their definition, their gradient, and that nothing else decides them."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import N, by_definition, case, cut, relative
from torch import Tensor
from training import OPTIONS, data, equal, state
from transformers import PreTrainedModel

import sparsekd
from sparsekd import distillation
from sparsekd.distillation import objective
from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.history import Validation
from sparsekd.distillation.losses import Mode, kd_loss
from sparsekd.distillation.weighting import by_source, entropy, within_blocks
from sparsekd.errors import Stopped, UsageError
from sparsekd.recipe import distill_section, load_recipe
from sparsekd.teacher import Cache, Online, Targets, fill

WEIGHTINGS = ["entropy", "gap", "domain"]
SOURCES = ["wiki", "code", "code", "wiki"] * 3 + ["wiki", "code"]


def domains(blocks: Tensor, cache: Cache | Online) -> distillation.Data:
    return replace(data(blocks, cache), sources=SOURCES)


# ---- the definition


def test_entropy_is_that_of_the_kept_tokens_and_the_tail() -> None:
    half, nothing = math.log(0.5), -math.inf
    targets = Targets(
        torch.tensor([[0, 1], [0, 1], [0, 1]]),
        torch.tensor([[half, 2 * half], [half, half], [0.0, nothing]]),
        torch.tensor([2 * half, nothing, nothing]),
        torch.zeros(3),
    )
    torch.testing.assert_close(entropy(targets), torch.tensor([-1.5 * half, -half, 0.0]))


def test_weights_are_half_equal_and_half_in_proportion_and_their_mean_is_one_in_every_block() -> None:
    """Three blocks of four places, of which some do not count; in the last the scores are nothing, but for rounding."""
    rows = torch.tensor([0, 1, 2, 4, 6, 8, 9])
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 0.0, 0.0, -1e-9])
    found = within_blocks(scores, rows, torch.Size([3, 4]))
    torch.testing.assert_close(found, torch.tensor([0.75, 1.0, 1.25, 1.5, 0.5, 1.0, 1.0]))


def test_sources_are_weighted_by_their_validation_kd() -> None:
    losses = {"loss": 0.0, "ce": 0.0, "perplexity": 0.0, "agreement": 0.0}
    seen = {"wiki": losses | {"kd": 0.1}, "code": losses | {"kd": 0.4}, "other": losses | {"kd": 9.0}}
    validation = Validation(3, **losses, kd=0.2, domains=seen)
    assert by_source(validation, {"wiki": 200, "code": 100, "new": 100}) == pytest.approx(
        {"wiki": 0.75, "code": 1.5, "new": 1.0}
    )
    at_the_teacher = replace(validation, domains={name: losses | {"kd": -1e-9} for name in seen})
    assert by_source(at_the_teacher, {"wiki": 200, "code": 100}) == {"wiki": 1.0, "code": 1.0}


# ---- the gradient


@pytest.mark.parametrize(("mode", "temperature"), [("bucket", 1.0), ("bucket", 2.0), ("paper", 3.0), ("exact_t", 1.5)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_both_losses_equal_float64_autograd_of_the_weighted_formula(
    mode: Mode, temperature: float, softcap: float | None
) -> None:
    hidden, weight, labels, teacher = case()
    targets = cut(teacher)
    weights = 2 * torch.rand(N, generator=torch.Generator().manual_seed(3))
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64.T if softcap is None else softcap * torch.tanh(h64 @ w64.T / softcap)
    counts = torch.arange(N) % 5 != 0
    kd = (weights * by_definition(logits, targets, mode, temperature))[counts].sum() / 30
    ce = F.cross_entropy(logits[counts], labels[counts], reduction="sum") / 30
    expected = torch.autograd.grad(0.3 * kd + 0.7 * ce, (h64, w64), retain_graph=True)
    labels[~counts] = -100
    options: dict[str, Any] = {"mode": mode, "alpha": 0.3, "temperature": temperature, "denominator": 30}

    reference = kd_loss(logits, labels, targets, weights=weights, **options)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    fused = linear_kd_loss(h, w, labels, targets, weights=weights, softcap=softcap, chunk_size=7, **options)
    for loss, inputs, tolerance in ((reference, (h64, w64), 1e-6), (fused, (h, w), 1e-6)):
        assert loss.kd.item() == pytest.approx(kd.item(), rel=1e-5)
        assert loss.ce.item() == pytest.approx(ce.item(), rel=1e-5)
        for a, b in zip(torch.autograd.grad(loss.total, inputs), expected, strict=True):
            assert relative(a, b) < tolerance


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("weighting", ["entropy", "gap"])
def test_the_objective_s_gradient_is_that_of_the_definition(
    weighting: str, is_fused: bool, new_student: Any, blocks: Tensor, cache: Cache
) -> None:
    """The weights are numbers: nothing is differentiated through them."""
    student = new_student()
    options = replace(OPTIONS, weighting=weighting, alpha=0.8)
    measured = objective.Objective(student, options, cache.vocab_size)
    measured._head = measured._head._replace(fused=is_fused)
    batch = distillation.make_batch(data(blocks, cache), [0, 1, 2], measured.vocab_size)
    measured(batch, 69).total.backward()
    found = [parameter.grad for parameter in student.parameters()]
    student.zero_grad()

    logits = student(batch.tokens).logits[:, :-1].flatten(0, 1)
    kd = torch.stack(
        [
            kd_loss(logits[i : i + 1], batch.labels[i : i + 1], Targets(*(c[i : i + 1] for c in batch.targets)),
                    mode=options.loss, alpha=1.0, temperature=options.temperature, denominator=1).total
            for i in range(len(logits))
        ]
    )  # fmt: skip
    if weighting == "gap":
        scores = kd.detach()
    else:
        p = torch.cat([batch.targets[1], batch.targets[2][:, None]], -1).exp()
        scores = -(p * p.log()).sum(-1)
    means = scores.view(3, 23).mean(-1).repeat_interleave(23)
    weighted = ((0.5 + 0.5 * scores / means) * kd).sum() / 69
    (0.8 * weighted + 0.2 * F.cross_entropy(logits, batch.labels)).backward()
    for ours, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-6)


# ---- what does not decide it


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_micro_batch_size_does_not_change_the_step(
    weighting: str, new_student: Any, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """Also where blocks are of different lengths, and documents kept apart."""
    generator = np.random.default_rng(0)
    ragged = [generator.integers(1, 300, length).astype(np.int32) for length in (24, 10, 17, 24, 9, 12)]
    ragged[0][5] = ragged[2][9] = 0
    options: dict[str, Any] = {"tokenizer_hash": "t", "corpus_fingerprint": "c", "top_k": 8, "separator": 0}
    cache = fill(teacher, tmp_path / "ragged", dict(enumerate(ragged)), **options)
    assert cache is not None
    sources = ["wiki", "code", "wiki", "code", "wiki", "code"]
    everything = distillation.Data(ragged, lambda epoch: np.arange(4), [4, 5], cache, sources, 0)
    steps = {}
    for key in (None, weighting):
        for micro in (1, 2, 4):
            settings = replace(OPTIONS, epochs=1, micro_batch_size=micro, weighting=key)
            steps[key, micro] = distillation.train(new_student(), everything, settings).steps[0]
    for micro in (2, 4):
        assert steps[weighting, micro].loss == pytest.approx(steps[weighting, 1].loss, rel=1e-5)
        assert steps[weighting, micro].grad_norm == pytest.approx(steps[weighting, 1].grad_norm, rel=1e-4)
    assert steps[weighting, 1].kd != pytest.approx(steps[None, 1].kd, rel=1e-3)  # that it could fail
    assert steps[weighting, 1].ce == pytest.approx(steps[None, 1].ce, rel=1e-5)


def test_validation_is_not_weighted(new_student: Any, blocks: Tensor, cache: Cache) -> None:
    """What the best weights are chosen by is the same loss, whatever is trained."""
    plain = distillation.measure(new_student(), domains(blocks, cache), OPTIONS)
    for weighting in WEIGHTINGS:
        options = replace(OPTIONS, weighting=weighting)
        assert distillation.measure(new_student(), domains(blocks, cache), options) == plain


def test_an_online_teacher_s_entropy_is_that_of_its_cache(
    teacher: PreTrainedModel, new_student: Any, blocks: Tensor, cache: Cache
) -> None:
    options = replace(OPTIONS, weighting="entropy", epochs=1)
    from_cache = distillation.train(new_student(), data(blocks, cache), options)
    online = distillation.train(new_student(), data(blocks, Online(teacher, 8)), options)
    for a, b in zip(from_cache.steps, online.steps, strict=True):
        assert a.kd == pytest.approx(b.kd, rel=2e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_stopped_training_ends_with_the_same_bytes(
    weighting: str, new_student: Any, blocks: Tensor, cache: Cache, tmp_path: Path
) -> None:
    """Sources are weighted by a validation that was before the checkpoint."""
    options = replace(OPTIONS, weighting=weighting)

    def train(folder: Path, stop_at: int | None = None) -> PreTrainedModel:
        student, done = new_student(), []
        distillation.train(
            student,
            domains(blocks, cache),
            options,
            folder=folder,
            on_step=lambda step, _: done.append(step.step),
            stop_signal=lambda: 15 if done[-1] == stop_at else None,
        )
        return student

    straight = train(tmp_path / "straight")
    with contextlib.suppress(Stopped):
        train(tmp_path / "stopped", stop_at=3)
    assert equal(state(train(tmp_path / "stopped")), state(straight))
    assert not equal(state(straight), state(new_student()))


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weighting=hard"], "distill.weighting is 'hard': expected one of entropy, gap, domain"),
        (["weighting=gap", "loss=exact_t"], "distill.weighting is gap: expected null unless loss is bucket or paper"),
        (["weighting=gap", "loss=renorm_full"], "distill.weighting is gap: expected null unless loss is"),
        (["weighting=entropy", "alpha=0"], "expected null unless loss is bucket or paper and alpha above 0"),
        (
            ["weighting=domain"],
            "distill.weighting is domain: expected another than domain where corpus.sources",
        ),
    ],
)
def test_weightings_that_do_not_fit(overrides: list[str], message: str, tiny_recipe: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(str(tiny_recipe), tuple(f"distill.{override}" for override in overrides))
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_known_are_not_compared(new_student: Any, blocks: Tensor, cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"distill\.weighting is domain, which compares sources: expected"):
        sparsekd.distill(new_student(), blocks, cache, weighting="domain")
    assert distill_section({"weighting": None}).weighting is None
