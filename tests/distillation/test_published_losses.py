"""Published losses, with their formulas written out: the same where they are right."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import N, V, case, cut, everything, relative
from torch import Tensor

from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.losses import Mode, kd_loss
from sparsekd.teacher import Targets


def trl_generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """TRL's GKDTrainer: beta KL(teacher, mixture) + (1 - beta) KL(student, mixture), and plain KLs at the ends."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    mixture = torch.logsumexp(torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)]), 0)
    of_teacher, of_student = (F.kl_div(mixture, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    return beta * of_teacher + (1 - beta) * of_student


def trl_server_distillation(student: Tensor, targets: Targets) -> Tensor:
    """TRL's ServerDistillationTrainer and Megatron-LM: log(1 - sum) of both as one more token."""
    log_q = student.log_softmax(-1).gather(-1, targets.ids)
    columns = []
    for log_probs in (log_q, targets.log_probs):
        log_head = log_probs.double().logsumexp(-1, keepdim=True).clamp_max(-1e-7)
        columns.append(torch.cat([log_probs.double(), torch.log(-torch.expm1(log_head))], -1))
    return F.kl_div(columns[0], columns[1], reduction="sum", log_target=True)


def distillkit_sparse_kl(student: Tensor, targets: Targets, temperature: float, missing: str) -> Tensor:
    """DistillKit's sparse_kl_div: the student's full softmax; the teacher renormalised, or with a bucket of r^(1/T)."""
    log_q = (student / temperature).log_softmax(-1).gather(-1, targets.ids)
    log_p = targets.log_probs / temperature
    if missing == "zero":
        log_p = log_p.log_softmax(-1)
    else:
        log_p = torch.cat([log_p, targets.log_tail[:, None] / temperature], -1).log_softmax(-1)
        log_q = torch.cat([log_q, torch.log1p(-log_q.exp().sum(-1, keepdim=True))], -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def model_opt_kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """ModelOpt's LogitsDistillationLoss: T^2 times torch's KL of both tempered."""
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * F.kl_div(log_q, p, reduction=reduction)


def liger_chunked(
    h: Tensor, w: Tensor, labels: Tensor, teacher: Tensor, weights: tuple[float, float], temperature: float
) -> Tensor:
    """Liger's LigerFusedLinearJSDLoss at beta = 0: by chunks, both logits tempered, weights, no T^2."""
    total = h.new_zeros(())
    for rows in torch.arange(len(h)).split(16):
        logits = h[rows] @ w.T
        hard = F.cross_entropy(logits, labels[rows], reduction="sum")
        tempered = [(x / temperature).log_softmax(-1) for x in (logits, teacher[rows])]
        total = total + weights[0] * hard + weights[1] * F.kl_div(*tempered, reduction="sum", log_target=True)
    return total


def our_gradient(student: Tensor, targets: Targets, mode: Mode, temperature: float) -> tuple[float, Tensor]:
    z = student.detach().double().requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.long)
    loss = kd_loss(z, labels, targets, mode=mode, alpha=1.0, temperature=temperature, denominator=1)
    return loss.kd.item(), torch.autograd.grad(loss.total, z)[0]


def published(loss: Callable[..., Tensor], student: Tensor, *arguments: Any) -> tuple[float, Tensor]:
    z = student.detach().double().requires_grad_()
    value = loss(z, *arguments)
    return value.item(), torch.autograd.grad(value, z)[0]


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert relative(ours[1], theirs[1]) < 1e-5


def students() -> tuple[Tensor, Tensor, Targets]:
    hidden, weight, _, teacher = case()
    return hidden @ weight.T, teacher, cut(teacher)


@pytest.mark.parametrize("mode", ["bucket", "paper", "exact_t", "renorm_full"])
def test_with_every_token_kept_all_modes_are_trls_forward_kl(mode: Mode) -> None:
    student, teacher, _ = students()
    ours = our_gradient(student, everything(teacher.double()), mode, 1.0)
    assert_same(ours, published(trl_generalized_jsd, student, teacher.double(), 0.0))


@pytest.mark.parametrize("mode", ["bucket", "exact_t"])
def test_at_temperature_one_it_is_trls_server_distillation_and_distillkits_bucket(mode: Mode) -> None:
    student, _, targets = students()
    ours = our_gradient(student, targets, mode, 1.0)
    assert_same(ours, published(trl_server_distillation, student, targets))
    assert_same(ours, published(distillkit_sparse_kl, student, targets, 1.0, "symmetric_uniform"))


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_distillkits_bucket_is_biased_above_temperature_one(temperature: float) -> None:
    """r^(1/T) counts the tail as one token: at the teacher itself its gradient is far from zero."""
    _, teacher, targets = students()
    biased = published(distillkit_sparse_kl, teacher, targets, temperature, "symmetric_uniform")[1]
    right = our_gradient(teacher, targets, "bucket", temperature)[1]
    assert float(biased.abs().sum(-1).mean()) > 0.1
    assert float(right.abs().sum(-1).mean()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_renorm_full_is_distillkits_zero(temperature: float) -> None:
    student, _, targets = students()
    ours = our_gradient(student, targets, "renorm_full", temperature)
    assert_same(ours, published(distillkit_sparse_kl, student, targets, temperature, "zero"))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("mode", ["exact_t", "paper"])
def test_with_every_token_kept_it_is_model_opts_tempered_kl(mode: Mode, temperature: float) -> None:
    """As ModelOpt's trainer uses it; its own default reduction divides by the vocabulary as well."""
    student, teacher, _ = students()
    ours = our_gradient(student, everything(teacher.double()), mode, temperature)
    assert_same(ours, published(model_opt_kl, student, teacher.double(), temperature, "sum"))
    with pytest.warns(UserWarning, match="divides the total loss by both"):
        by_default = published(model_opt_kl, student, teacher.double(), temperature, "mean")
    assert by_default[0] * V == pytest.approx(ours[0] / N, rel=1e-5)


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_the_square_of_the_temperature_is_in_the_gradient(temperature: float) -> None:
    """axolotl's kernel multiplies only the reported value by T^2: its gradient is 1/T^2 of the true one."""
    student, teacher, _ = students()

    def reported_only(z: Tensor) -> Tensor:
        bare = model_opt_kl(z, teacher.double(), temperature, "sum") / temperature**2
        return bare + (bare * (temperature**2 - 1)).detach()

    ours = our_gradient(student, everything(teacher.double()), "exact_t", temperature)
    value, gradient = published(reported_only, student)
    assert value == pytest.approx(ours[0], rel=1e-5)
    assert relative(gradient * temperature**2, ours[1]) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_with_every_token_kept_it_is_ligers_chunked_loss(temperature: float) -> None:
    """With its soft weight multiplied by the T^2 that it leaves out."""
    hidden, weight, labels, teacher = case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    ours = linear_kd_loss(
        h, w, labels, everything(teacher), mode="exact_t", alpha=0.3, temperature=temperature, denominator=1
    )
    theirs = liger_chunked(h, w, labels, teacher, (0.7, 0.3 * temperature**2), temperature)
    assert ours.total.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(total, (h, w)) for total in (ours.total, theirs)), strict=True):
        assert relative(a, b.double()) < 1e-5
