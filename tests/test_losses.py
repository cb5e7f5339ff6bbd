"""Every mode against float64 autograd of its formula, its fixed point, and published losses where they are right."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from sparsekd.distillation.losses import Mode, kd_loss, linear_kd_loss
from sparsekd.errors import DataError, UsageError
from sparsekd.teacher.cache import Samples, Targets
from sparsekd.teacher.filling import top_k_distribution

N, D, V, K = 40, 16, 97, 8
MODES = get_args(Mode)
TOP_K_MODES = [mode for mode in MODES if mode != "sampled"]
MODES_AT = [(mode, t) for mode in TOP_K_MODES for t in (1.0, 1.5, 2.0, 3.0)] + [("sampled", 1.0)]


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weight, labels (most of them not among the kept tokens), and a near teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    teacher = (hidden + 0.3 * torch.randn(N, D, generator=generator)) @ weight.T
    return hidden, weight, labels, teacher


def cut(logits: Tensor, top_k: int = K) -> Targets:
    """The cache's targets, out of inference mode, so that autograd may save them."""
    return Targets(*(value.clone() for value in top_k_distribution(logits, top_k)))


def drawn(logits: Tensor, num_draws: int = 20, seed: int = 0) -> Samples:
    """Independent draws from the teacher: the share of each token is its weight. Unused slots repeat token 0."""
    generator = torch.Generator().manual_seed(seed)
    draws = logits.softmax(-1).multinomial(num_draws, replacement=True, generator=generator)
    shares = torch.zeros_like(logits).scatter_add(-1, draws, torch.full(draws.shape, 1 / num_draws))
    weights, ids = shares.topk(min(num_draws, logits.shape[-1]), -1)
    return Samples(ids.masked_fill(weights == 0, 0), weights.log())


def targets_for(mode: Mode, logits: Tensor) -> Targets | Samples:
    return drawn(logits) if mode == "sampled" else cut(logits)


def everything(logits: Tensor) -> Targets:
    """A teacher of whom nothing is cut off."""
    nothing = torch.full((len(logits),), -torch.inf)
    ids = torch.arange(logits.shape[-1]).expand(logits.shape)
    return Targets(ids, logits.log_softmax(-1), nothing, nothing)


def by_definition(logits: Tensor, targets: Targets | Samples, mode: Mode, temperature: float) -> Tensor:
    """KD of each position by the formulas of the module's docstring, written out in float64."""
    z = logits.double()
    q, soft_q = z.softmax(-1).gather(-1, targets.ids), (z / temperature).softmax(-1).gather(-1, targets.ids)
    if isinstance(targets, Samples):
        weights = targets.log_weights.double().softmax(-1)
        return (torch.special.xlogy(weights, weights) - weights * q.log()).sum(-1)
    p, r = targets.log_probs.double().exp(), targets.log_tail.double().exp()
    total = p.sum(-1) + r
    log_count = torch.full_like(r, V - K).log()
    log_half = targets.log_tail_half.double() - total.log() / 2
    p, r = p / total[:, None], r / total
    head, student_head = p.sum(-1), q.sum(-1)
    inner = p ** (1 / temperature) / (p ** (1 / temperature)).sum(-1, keepdim=True)
    inner_q = soft_q / soft_q.sum(-1, keepdim=True)
    paper = temperature**2 * (inner * (inner / inner_q).log()).sum(-1)
    if mode == "bucket":
        return head * (head / student_head).log() + r * (r / (1 - student_head)).log() + head * paper
    if mode == "paper":
        return paper
    if mode == "renorm_full":
        return temperature**2 * (inner * (inner / soft_q).log()).sum(-1)
    a = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    through = torch.linalg.solve(torch.stack([a**0, a, a**2], -1), torch.stack([log_count, log_half, r.log()]))
    tail = (through[0] + through[1] / temperature + through[2] / temperature**2).exp()
    soft = torch.cat([p ** (1 / temperature), tail[:, None]], -1)
    soft = soft / soft.sum(-1, keepdim=True)
    student = torch.cat([soft_q, 1 - soft_q.sum(-1, keepdim=True)], -1)
    return temperature**2 * (soft * (soft / student).log()).sum(-1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


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


# ---- published losses, with their formulas written out


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


# ---- what is held and worked out


class Watched(TorchDispatchMode):
    """The shapes of all results while it is on, with the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.append((func.overloadpacket.__name__, tuple(result.shape)))
        return result


@pytest.mark.parametrize(("mode", "temperature"), [("bucket", 2.0), ("paper", 2.0), ("exact_t", 2.0), ("sampled", 1.0)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_more_than_a_chunk_of_logits_and_one_exponential(
    mode: Mode, temperature: float, softcap: float | None
) -> None:
    hidden, weight, labels, teacher = case()
    targets, h = targets_for(mode, teacher), hidden.requires_grad_()
    buffers = 1 + (mode == "exact_t") + (softcap is not None)
    with Watched() as watched:
        linear_kd_loss(
            h,
            weight,
            labels,
            targets,
            mode=mode,
            alpha=0.5,
            temperature=temperature,
            denominator=N,
            softcap=softcap,
            chunk_size=6 * buffers,
        )
    wide = [(name, shape) for name, shape in watched.seen if shape[-1:] == (V,) and shape[0] != D]  # not the weight
    assert {shape for _, shape in wide} == {(6, V), (4, V)}
    num_chunks = math.ceil(N / 6)
    assert sum(name.startswith("exp") for name, _ in wide) == num_chunks
    made = [name for name, _ in wide if not name.endswith("_")]  # all others work in place
    assert len(made) == num_chunks * buffers
    assert (V, D) not in [shape for name, shape in watched.seen if name not in {"slice", "detach", "t", "_to_copy"}]


def test_no_gradient_is_worked_out_where_none_is_asked_for() -> None:
    hidden, weight, labels, teacher = case()
    w = weight.requires_grad_()
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": N}
    targets = cut(teacher)
    expected = linear_kd_loss(hidden, w, labels, targets, **options).total.item()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without, Watched() as watched:
            loss = linear_kd_loss(hidden, w, labels, targets, **options)
        assert loss.total.item() == expected
        assert not loss.total.requires_grad
        assert (V, D) not in [shape for name, shape in watched.seen if name in {"zeros_like", "addmm_"}]


def test_backward_multiplies_by_the_incoming_gradient_and_runs_once() -> None:
    hidden, weight, labels, teacher = case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    targets = cut(teacher)
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": N}
    plain = torch.autograd.grad(linear_kd_loss(h, w, labels, targets, **options).total, (h, w))
    loss = linear_kd_loss(h, w, labels, targets, **options).total
    found = torch.autograd.grad(3 * loss, (h, w), retain_graph=True)
    for a, b in zip(found, plain, strict=True):
        assert torch.allclose(a, 3 * b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (h, w))


# ---- models


def test_tied_and_frozen_embeddings(make_model: Callable[..., PreTrainedModel]) -> None:
    """The output weight's gradient joins the input embeddings'; a frozen one gets none."""
    model = make_model("llama", tie_word_embeddings=True)
    tokens = torch.arange(1, 31)[None]
    weight, labels = model.get_output_embeddings().weight, tokens[0, 1:]
    teacher = model(tokens).logits[0, :-1].detach() + torch.randn(29, len(weight), generator=torch.manual_seed(0))
    targets = cut(teacher)
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": 29}

    def gradients(fused: bool) -> dict[str, Tensor]:
        model.zero_grad()
        if fused:
            hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
            linear_kd_loss(hidden, weight, labels, targets, **options).total.backward()
        else:
            kd_loss(model(tokens).logits[0, :-1], labels, targets, **options).total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for trains in (True, False):
        weight.requires_grad_(trains)
        ours, expected = gradients(True), gradients(False)
        assert ours.keys() == expected.keys()
        assert ("model.embed_tokens.weight" in ours) == trains
        assert all(relative(ours[name], expected[name].double()) < 1e-5 for name in ours)


def test_a_model_that_caps_its_logits(tokenizer: Any) -> None:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    tokens = torch.arange(1, 31)[None]
    logits = model(tokens).logits[0, :-1]
    assert float(logits.detach().abs().max()) > 1.5
    targets = cut(logits.flip(0))
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": 29}
    hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
    fused = linear_kd_loss(hidden, model.lm_head.weight, tokens[0, 1:], targets, softcap=2.0, **options)
    reference = kd_loss(logits, tokens[0, 1:], targets, **options)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss.total, parameters) for loss in (fused, reference)), strict=True):
        assert relative(a, b.double()) < 1e-4


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
