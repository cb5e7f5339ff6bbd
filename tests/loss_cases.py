"""Cases for the losses: states, labels and a near teacher, its targets, and the formulas in float64."""

from typing import get_args

import torch
from torch import Tensor

from sparsekd.distillation.losses import Mode
from sparsekd.teacher import Samples, Targets, top_k_distribution

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
