"""Every mode against float64 autograd of its formula, and its fixed point."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import MODES, MODES_AT, TOP_K_MODES, D, K, N, V, by_definition, case, cut, drawn, relative, targets_for
from torch import Tensor

from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.losses import Mode, kd_loss
from sparsekd.errors import DataError, UsageError
from sparsekd.teacher import Samples, Targets

# ---- exactness


@pytest.mark.parametrize(("mode", "temperature"), MODES_AT)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, None), (0.7, 5.0)])
def test_both_equal_float64_autograd_of_the_formula(
    mode: Mode, temperature: float, alpha: float, scale: float, softcap: float | None
) -> None:
    """T^2 included: it is in the formula that is differentiated."""
    hidden, weight, labels, teacher = case()
    targets = targets_for(mode, teacher)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = scale * (h64 @ w64.T)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kd = by_definition(logits, targets, mode, temperature).sum() / 50
    ce = F.cross_entropy(logits, labels, reduction="sum") / 50
    expected = alpha * kd + (1 - alpha) * ce
    gradients = torch.autograd.grad(expected, (h64, w64), retain_graph=True)
    options: dict[str, Any] = {"mode": mode, "alpha": alpha, "temperature": temperature, "denominator": 50}

    reference = kd_loss(logits, labels, targets, **options)
    assert reference.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for a, b in zip(torch.autograd.grad(reference.total, (h64, w64)), gradients, strict=True):
        assert relative(a, b) < 1e-9

    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for chunk_size in (7, 64):
        fused = linear_kd_loss(h, w, labels, targets, scale=scale, softcap=softcap, chunk_size=chunk_size, **options)
        assert fused.total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (fused.kd.item(), fused.ce.item()) == pytest.approx((kd.item(), ce.item()), rel=1e-6)
        for a, b in zip(torch.autograd.grad(fused.total, (h, w)), gradients, strict=True):
            assert relative(a, b) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_padded_rows_of_the_weight_take_no_probability_and_no_gradient(mode: Mode) -> None:
    hidden, weight, labels, teacher = case()
    targets = targets_for(mode, teacher)
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": 1.0, "denominator": N}
    padded = torch.cat([weight, torch.full((31, D), 5.0)]).requires_grad_()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    plain = linear_kd_loss(h, w, labels, targets, **options).total
    cut = linear_kd_loss(h, padded, labels, targets, vocab_size=V, **options).total
    assert cut.item() == plain.item()
    (grad_hidden, grad_weight), (cut_hidden, cut_weight) = (
        torch.autograd.grad(loss, (h, matrix)) for loss, matrix in ((plain, w), (cut, padded))
    )
    assert torch.equal(cut_hidden, grad_hidden)
    assert torch.equal(cut_weight[:V], grad_weight)
    assert not cut_weight[V:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [8, 256])
def test_masked_positions_have_no_part_whatever_they_hold(mode: Mode, chunk_size: int) -> None:
    """Also when all positions of a chunk are masked, and when their states are not finite and their ids not tokens."""
    hidden, weight, labels, teacher = case()
    targets = targets_for(mode, teacher)
    masked = torch.zeros(N, dtype=torch.bool)
    masked[[0, 9, 39]], masked[16:32] = True, True
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": 1.0, "denominator": 20}
    h, w = hidden.clone(), weight.requires_grad_()
    h[masked], labels[masked], targets.ids[masked] = torch.nan, -100, 10**6
    h.requires_grad_()
    for loss in (
        linear_kd_loss(h, w, labels, targets, chunk_size=chunk_size, **options),
        kd_loss(h @ w.T, labels, targets, **options),
    ):
        grad_hidden = torch.autograd.grad(loss.total, h)[0]
        kept = hidden[~masked].requires_grad_()
        rest = type(targets)(*(value[~masked] for value in targets))
        alone = kd_loss(kept @ w.T, labels[~masked], rest, **options)
        assert loss.total.item() == pytest.approx(alone.total.item(), rel=1e-6)
        assert relative(grad_hidden[~masked], torch.autograd.grad(alone.total, kept)[0]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_a_valid_position_has_no_loss(mode: Mode) -> None:
    hidden, weight, labels, teacher = case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    targets = targets_for(mode, teacher)
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": 1.0, "denominator": N}
    for function, inputs in ((linear_kd_loss, (h, w)), (kd_loss, (h @ w.T,))):
        loss = function(*inputs, labels.fill_(-100), targets, **options)
        assert loss.total.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss.total, (h, w)))


@pytest.mark.parametrize("parts", [1, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_does_not_depend_on_how_a_batch_is_split(parts: int, mode: Mode) -> None:
    hidden, weight, labels, teacher = case()
    targets, w = targets_for(mode, teacher), weight.requires_grad_()
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": 1.0, "denominator": N}
    for rows in torch.arange(N).chunk(parts):
        some = type(targets)(*(value[rows] for value in targets))
        linear_kd_loss(hidden[rows], w, labels[rows], some, **options).total.backward()
    assert w.grad is not None
    whole = linear_kd_loss(hidden, w, labels, targets, **options)
    assert torch.allclose(w.grad, torch.autograd.grad(whole.total, w)[0], atol=1e-6)


@given(st.integers(0, 10**6), st.sampled_from(MODES_AT), st.floats(0.01, 30), st.floats(-1e3, 1e3))
@settings(max_examples=60, deadline=None)
def test_not_negative_and_blind_to_a_shift_of_the_logits(
    seed: int, mode_at: tuple[Mode, float], spread: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(4, V, generator=generator, dtype=torch.float64) for _ in range(2))
    mode, temperature = mode_at
    targets = targets_for(mode, teacher.float())
    options: dict[str, Any] = {"mode": mode, "alpha": 1.0, "temperature": temperature, "denominator": 4}
    labels = torch.zeros(4, dtype=torch.long)
    z = student.requires_grad_()
    loss = kd_loss(z, labels, targets, **options)
    assert loss.kd.item() >= -1e-6
    assert loss.kd.item() == pytest.approx(kd_loss(student + shift, labels, targets, **options).kd.item(), rel=1e-6)
    gradient = torch.autograd.grad(loss.total, z)[0]
    assert float(gradient.sum(-1).abs().max()) < 1e-9 * (1 + float(gradient.abs().max()))


# ---- student = teacher


def at_the_teacher(mode: Mode, temperature: float, targets: Targets | Samples, logits: Tensor) -> Tensor:
    """The gradient for the logits where they are the teacher's own."""
    z = logits.double().requires_grad_()
    options: dict[str, Any] = {"mode": mode, "alpha": 1.0, "temperature": temperature, "denominator": 1}
    loss = kd_loss(z, torch.zeros(len(z), dtype=torch.long), targets, **options)
    return torch.autograd.grad(loss.total, z)[0]


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [(mode, t) for mode in ("bucket", "paper") for t in (1.0, 1.5, 2.0, 3.0)] + [("exact_t", 1.0), ("exact_t", 2.0)],
)
def test_zero_loss_and_gradient_where_student_equals_teacher(mode: Mode, temperature: float) -> None:
    hidden, weight, labels, _ = case()
    targets = cut(hidden @ weight.T)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_kd_loss(h, w, labels, targets, mode=mode, alpha=1.0, temperature=temperature, denominator=N)
    assert abs(loss.total.item()) < 1e-6
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in torch.autograd.grad(loss.total, (h, w)))


@pytest.mark.parametrize("temperature", [1.25, 1.5, 3.0])
def test_between_the_cached_temperatures_exact_t_is_off_by_the_interpolation_only(temperature: float) -> None:
    hidden, weight, _, _ = case()
    logits = hidden @ weight.T
    targets = cut(logits)
    soft = (logits / temperature).softmax(-1)
    tail = 1 - soft.gather(-1, targets.ids).sum(-1)
    found = at_the_teacher("exact_t", temperature, targets, logits).abs().sum(-1)
    biased = at_the_teacher("renorm_full", temperature, targets, logits).abs().sum(-1)
    assert float(found.mean()) < 0.1 * float(biased.mean())
    assert float((found / (2 * temperature) / tail).mean()) < 0.1  # relative error of the tail's mass


def test_sampled_is_zero_on_average_over_draws() -> None:
    hidden, weight, _, _ = case()
    logits, num_rounds = hidden @ weight.T, 400
    gradients = torch.stack(
        [at_the_teacher("sampled", 1.0, drawn(logits, seed=seed), logits) for seed in range(num_rounds)]
    )
    one = gradients.norm(dim=-1).square().mean().sqrt()
    mean = gradients.mean(0).norm(dim=-1).square().mean().sqrt()
    assert float(one) > 0.05
    assert float(mean) == pytest.approx(float(one) / math.sqrt(num_rounds), rel=0.1)  # what independent errors leave
    p = logits.double().softmax(-1)
    assert float(one) ** 2 == pytest.approx(float((1 - p.square().sum(-1)).mean()) / 20, rel=0.05)  # 20 draws


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_renorm_full_is_biased_by_the_mass_of_the_tail(temperature: float) -> None:
    """At the teacher itself it takes the tail's whole (tempered) mass away: an L1 norm of 2 r_T, times T."""
    hidden, weight, _, _ = case()
    logits = (hidden @ weight.T) / 2
    targets = cut(logits)
    tail = 1 - (logits.double() / temperature).softmax(-1).gather(-1, targets.ids).sum(-1)
    found = at_the_teacher("renorm_full", temperature, targets, logits).abs().sum(-1)
    assert torch.allclose(found, temperature * 2 * tail, rtol=1e-5)
    assert float(tail.mean()) > 0.1


# ---- numbers at the edge


@pytest.mark.parametrize("mode", TOP_K_MODES)
@pytest.mark.parametrize("log_tail", [-torch.inf, -30.0, math.log1p(-1e-7)])
def test_a_tail_of_almost_nothing_and_of_almost_everything(mode: Mode, log_tail: float) -> None:
    hidden, weight, labels, teacher = case()
    targets = cut(teacher)
    tail = torch.full((N,), log_tail, dtype=torch.float64)
    kept = torch.log(-torch.expm1(tail))[:, None] + targets.log_probs.double().log_softmax(-1)
    extreme = Targets(targets.ids, kept, tail, tail / 2 + math.log(V - K) / 2)
    if log_tail > -1e-6:
        assert float(kept.exp().sum(-1).max()) == pytest.approx(1e-7, rel=1e-3)
    h, w = hidden.requires_grad_(), (3 * weight).requires_grad_()
    options: dict[str, Any] = {"mode": mode, "alpha": 1.0, "temperature": 2.0, "denominator": N}
    loss = linear_kd_loss(h, w, labels, extreme, **options)
    h64, w64 = hidden.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected = kd_loss(h64 @ w64.T, labels, extreme, **options)
    assert loss.kd.item() == pytest.approx(expected.kd.item(), rel=1e-5)
    gradients = (torch.autograd.grad(x.total, i) for x, i in ((loss, (h, w)), (expected, (h64, w64))))
    for a, b in zip(*gradients, strict=True):
        assert torch.isfinite(a).all()
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(("mode", "temperature"), MODES_AT)
def test_logits_far_below_zero(mode: Mode, temperature: float) -> None:
    """Where `exp` of an unshifted logit is 0: the loss is that of the shifted ones."""
    logits = torch.tensor([[-100.0, 5.0, 2.0]])
    teacher = torch.tensor([[-100.0, 4.0, 3.0]])
    targets = drawn(teacher) if mode == "sampled" else cut(teacher, 2)
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": temperature, "denominator": 1}
    here, shifted = (
        kd_loss(logits + shift, torch.tensor([1]), targets, **options).total.item() for shift in (0.0, -1000.0)
    )
    assert math.isfinite(here)
    assert here == pytest.approx(shifted, rel=1e-3)  # of fp32 numbers near 1000


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_states_are_near_float32(mode: Mode) -> None:
    hidden, weight, labels, teacher = case()
    targets = targets_for(mode, teacher)
    options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": 1.0, "denominator": N}
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(linear_kd_loss(h, w, labels, targets, **options).total, (h, w))
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    found = torch.autograd.grad(linear_kd_loss(*low, labels, targets, **options).total, low)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.autograd.grad(linear_kd_loss(h, w, labels, targets, **options).total, (h, w))
    for a, b, c in zip(found, mixed, expected, strict=True):
        assert (a.dtype, b.dtype) == (torch.bfloat16, torch.float32)
        assert relative(a, c.double()) < 0.03
        assert relative(b, c.double()) < 0.03


# ---- refusals


def test_what_does_not_go_together_is_refused() -> None:
    hidden, weight, labels, teacher = case()
    top_k, samples = cut(teacher), drawn(teacher)
    twice = top_k._replace(ids=top_k.ids.clone().index_fill_(-1, torch.tensor([3, 5]), 7))
    foreign = top_k._replace(ids=top_k.ids.clone().index_fill_(-1, torch.tensor(0), V))
    cases: list[tuple[Any, Mode, float, type[Exception], str]] = [
        (top_k, "sampled", 1.0, UsageError, "distill.loss=sampled does not fit a cache of top-k targets"),
        (samples, "bucket", 1.0, UsageError, "distill.loss=bucket does not fit a cache of sampled targets"),
        (samples, "sampled", 2.0, UsageError, "set distill.temperature=1"),
        (top_k, "exact_t", 0.5, UsageError, "temperatures from 1 on, not at 0.5"),
        (twice, "bucket", 1.0, DataError, "keep a token twice"),
        (foreign, "bucket", 1.0, DataError, "outside the student's vocabulary of 97"),
    ]
    for targets, mode, temperature, error, message in cases:
        options: dict[str, Any] = {"mode": mode, "alpha": 0.5, "temperature": temperature, "denominator": N}
        with pytest.raises(error, match=message):
            linear_kd_loss(hidden, weight, labels, targets, **options)
        with pytest.raises(error, match=message):
            kd_loss(hidden @ weight.T, labels, targets, **options)
