"""The loss against float64 autograd of the formula, its fixed point, and the published losses where they are right."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.cache import Targets
from sparsekd.losses import bucket_loss, linear_bucket_loss
from sparsekd.teacher import top_k_distribution

N, D, V, K = 40, 16, 97, 8


def case(seed: int = 0, top_k: int = K) -> tuple[Tensor, Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    teacher = (hidden + 0.3 * torch.randn(N, D, generator=generator)) @ weight.T
    return hidden, weight, labels, copied(top_k_distribution(teacher, top_k))


def copied(targets: Targets) -> Targets:
    """Out of inference mode, so that autograd may save them."""
    return Targets(*(value.clone() for value in targets))


def by_definition(logits: Tensor, labels: Tensor, targets: Targets, alpha: float, temperature: float) -> Tensor:
    """The formula of the module's docstring, written out in float64."""
    q = logits.double().softmax(-1)
    p = targets.log_probs.double().exp()
    r = targets.log_tail.double().exp()
    p, r = p / (p.sum(-1) + r)[:, None], r / (p.sum(-1) + r)
    q_kept = q.gather(-1, targets.ids)
    head, student_head = p.sum(-1), q_kept.sum(-1)
    kd = head * (head / student_head).log() + r * (r / (1 - student_head)).log()
    soft_p = (p.log() / temperature).softmax(-1)
    soft_q = (q_kept.log() / temperature).softmax(-1)
    kd = kd + head * temperature**2 * (soft_p * (soft_p / soft_q).log()).sum(-1)
    ce = F.cross_entropy(logits.double(), labels, reduction="none")
    return (alpha * kd + (1 - alpha) * ce).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_fused_equals_float64_autograd(temperature: float, alpha: float, chunk_size: int) -> None:
    hidden, weight, labels, targets = case()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = by_definition(h64 @ w64.T, labels, targets, alpha, temperature) / 50
    gradients = torch.autograd.grad(expected, (h64, w64))

    h, w = hidden.requires_grad_(), weight.requires_grad_()
    options = {"alpha": alpha, "temperature": temperature, "denominator": 50}
    for loss in (
        linear_bucket_loss(h, w, labels, targets, chunk_size=chunk_size, **options),
        bucket_loss(h @ w.T, labels, targets, **options),
    ):
        assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
        found = torch.autograd.grad(loss.total, (h, w))
        for a, b in zip(found, gradients, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 3.0])
def test_zero_loss_and_gradient_where_student_equals_teacher(temperature: float) -> None:
    hidden, weight, labels, _ = case()
    targets = copied(top_k_distribution(hidden @ weight.T, K))
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_bucket_loss(h, w, labels, targets, alpha=1.0, temperature=temperature, denominator=N)
    gradients = torch.autograd.grad(loss.total, (h, w))
    assert abs(loss.total.item()) < 1e-6
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in gradients)


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_renormalised_targets_against_the_full_student_would_not_be_zero_there(temperature: float) -> None:
    """The common alternative, which this loss avoids: its gradient at student = teacher is far from zero."""
    hidden, weight, _, _ = case()
    logits = (hidden @ weight.T).requires_grad_()
    targets = copied(top_k_distribution(logits, K))
    soft = (targets.log_probs / temperature).softmax(-1)
    student = F.log_softmax(logits / temperature, -1).gather(-1, targets.ids)
    loss = temperature**2 * (soft * (soft.log() - student)).sum(-1).mean()
    assert float(torch.autograd.grad(loss, logits)[0].norm(dim=-1).mean()) * N > 0.05


def test_at_temperature_one_it_is_the_kl_of_the_coarsened_distributions() -> None:
    """TRL's and Megatron-LM's ghost token: KL over the K kept tokens and one bucket for all others."""
    hidden, weight, labels, targets = case()
    q = (hidden @ weight.T).double().softmax(-1).gather(-1, targets.ids)
    student = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    teacher = torch.cat([targets.log_probs, targets.log_tail[:, None]], -1).double().exp()
    expected = (teacher * (teacher / student).log()).sum()
    loss = bucket_loss(hidden @ weight.T, labels, targets, alpha=1.0, temperature=1.0, denominator=1)
    assert float(loss.kd) == pytest.approx(expected.item(), rel=1e-4)


def test_with_all_but_one_token_kept_it_is_the_full_kl() -> None:
    hidden, weight, labels, _ = case()
    teacher = hidden.flip(0) @ weight.T
    targets = copied(top_k_distribution(teacher, V - 1))
    expected = F.kl_div(
        F.log_softmax(hidden @ weight.T, -1), F.log_softmax(teacher, -1), log_target=True, reduction="sum"
    )
    loss = linear_bucket_loss(hidden, weight, labels, targets, alpha=1.0, temperature=1.0, denominator=1)
    assert float(loss.kd) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("parts", [1, 4, 8])
def test_gradient_does_not_depend_on_how_a_batch_is_split(parts: int) -> None:
    hidden, weight, labels, targets = case()
    w = weight.requires_grad_()
    for rows in torch.arange(N).chunk(parts):
        some = Targets(*(value[rows] for value in targets))
        linear_bucket_loss(
            hidden[rows], w, labels[rows], some, alpha=0.5, temperature=2.0, denominator=N
        ).total.backward()
    assert w.grad is not None
    whole = linear_bucket_loss(hidden, w, labels, targets, alpha=0.5, temperature=2.0, denominator=N)
    assert torch.allclose(w.grad, torch.autograd.grad(whole.total, w)[0], atol=1e-6)


@pytest.mark.parametrize("offset", [-30.0, -1e-3])
def test_extreme_tails_stay_finite(offset: float) -> None:
    """A tail of almost nothing, and a tail of almost everything."""
    hidden, weight, labels, targets = case()
    log_tail = torch.full((N,), offset)
    kept = torch.log1p(-log_tail.exp()) + F.log_softmax(targets.log_probs, -1).T
    extreme = Targets(targets.ids, kept.T.contiguous(), log_tail)
    h = hidden.requires_grad_()
    loss = linear_bucket_loss(h, weight * 30, labels, extreme, alpha=1.0, temperature=2.0, denominator=N)
    assert torch.isfinite(loss.total)
    assert torch.isfinite(torch.autograd.grad(loss.total, h)[0]).all()


def test_frozen_output_weight_gets_no_gradient() -> None:
    hidden, weight, labels, targets = case()
    h = hidden.requires_grad_()
    linear_bucket_loss(h, weight, labels, targets, alpha=0.5, temperature=2.0, denominator=N).total.backward()
    assert h.grad is not None
    assert weight.grad is None


def test_the_published_shift_fixture() -> None:
    """Logits far below zero, where `exp` of an unshifted logit is 0: the loss is that of the shifted ones."""
    logits = torch.tensor([[-100.0, 5.0, 2.0]])
    targets = copied(top_k_distribution(torch.tensor([[-100.0, 4.0, 3.0]]), 2))
    options = {"alpha": 0.5, "temperature": 2.0, "denominator": 1}
    labels = torch.tensor([1])
    here, shifted = (bucket_loss(logits + shift, labels, targets, **options).total for shift in (0.0, -1000.0))
    assert here.item() == pytest.approx(shifted.item(), rel=1e-4)
