"""KL to a truncated teacher plus cross-entropy, with the tail of the vocabulary as one bucket.

For one position, with student probabilities q, the teacher's kept tokens S, P = sum_S p, r = 1 - P, Q = sum_S q:

    KD = P log(P/Q) + r log(r/(1-Q))  +  P T^2 sum_S p' log(p'/q')        p' = softmax(log p_S / T), q' likewise

The first two terms are the exact KL of "which kept token group, or the tail" at temperature 1; the last is the KL
inside S, tempered in the probability domain. It is zero, with zero gradient, exactly where the student equals the
teacher, at every temperature; renormalising the kept tokens against the full student, as is common, is not. At T = 1
it is the KL of the (k+1)-way coarsening. The loss is `alpha KD + (1 - alpha) CE`, summed over positions and divided
by `denominator`, the number of positions of the whole global batch.

Two implementations of the same function: `bucket_loss` from logits, through autograd, for models whose logits are
not a plain matrix product; `linear_bucket_loss` from hidden states, a chunk of logits at a time with the gradient
worked out in the forward pass: faster, and never more than a chunk of logits. A test holds them equal.

Shape letters: N positions, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.cache import Targets


class Loss(NamedTuple):
    total: Float[Tensor, ""]  # differentiable
    kd: Float[Tensor, ""]  # sum of KD over positions / denominator
    ce: Float[Tensor, ""]  # sum of CE over positions / denominator


def _normalised(targets: Targets) -> tuple[Tensor, Tensor]:
    """log p_S and log r rescaled to sum to exactly one: a rounded cache stays a distribution."""
    log_probs, log_tail = targets.log_probs.float(), targets.log_tail.float()
    log_total = torch.logaddexp(log_probs.logsumexp(-1), log_tail)
    return log_probs - log_total[..., None], log_tail - log_total


def bucket_loss(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    targets: Targets,
    *,
    alpha: float,
    temperature: float,
    denominator: int,
) -> Loss:
    """The loss from full logits, through autograd: the reference, and the way for models that cap or scale logits."""
    z = logits.float()
    log_p, log_r = _normalised(targets)
    log_total = z.logsumexp(-1)
    kept = z.gather(-1, targets.ids)
    in_tail = torch.ones_like(z, dtype=torch.bool).scatter_(-1, targets.ids, False)
    log_head = kept.logsumexp(-1) - log_total
    log_tail = z.masked_fill(~in_tail, -torch.inf).logsumexp(-1) - log_total
    kd = _bucket_kl(log_p, log_r, kept, log_head, log_tail, temperature).sum() / denominator
    ce = F.cross_entropy(z, labels, reduction="sum") / denominator
    return Loss(alpha * kd + (1 - alpha) * ce, kd.detach(), ce.detach())


def _bucket_kl(
    log_p: Tensor, log_r: Tensor, kept: Tensor, log_head: Tensor, log_tail: Tensor, temperature: float
) -> Float[Tensor, " N"]:
    log_head_p = log_p.logsumexp(-1)  # log P
    between = log_head_p.exp() * (log_head_p - log_head) + log_r.exp() * (log_r - log_tail)
    soft_p = F.log_softmax(log_p / temperature, dim=-1)
    soft_q = F.log_softmax(kept / temperature, dim=-1)
    inside = (soft_p.exp() * (soft_p - soft_q)).sum(-1)
    return between + log_head_p.exp() * temperature**2 * inside


def linear_bucket_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " N"],
    targets: Targets,
    *,
    alpha: float,
    temperature: float,
    denominator: int,
    chunk_size: int = 256,
) -> Loss:
    """The same loss of `hidden @ weight.T`, without ever holding more than `chunk_size` rows of logits."""
    log_p, log_r = _normalised(targets)
    total, kd, ce = _LinearBucketLoss.apply(
        hidden, weight, labels, targets.ids, log_p, log_r, alpha, temperature, denominator, chunk_size
    )  # type: ignore[misc]
    return Loss(total, kd.detach(), ce.detach())


class _LinearBucketLoss(torch.autograd.Function):
    """Gradient in the forward pass: the loss is a scalar, so backward only multiplies by its incoming gradient.

    With s = sum_V e^(z-m), split into s_t over the tail and e_S over the kept tokens (the tail is summed itself;
    1 - Q would cancel):

        dL/dz_j = q_j ((1-a) + a (1 - r/Q_t))                                   j not in S
        dL/dz_j = q_j ((1-a) + a (1 - P/Q)) + a P T (q'_j - p'_j)               j in S
        dL/dz_y -= (1-a)                                                        y the label
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ids: Tensor,
        log_p: Tensor,
        log_r: Tensor,
        alpha: float,
        temperature: float,
        denominator: int,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        kd_sum = hidden.new_zeros((), dtype=torch.float32)
        ce_sum = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            h, s, y = hidden[rows], ids[rows], labels[rows, None]
            z = (h @ matrix.T).float()
            kept, label_logit = z.gather(-1, s), z.gather(-1, y)[:, 0]
            m = z.amax(-1, keepdim=True)
            e = z.sub_(m).exp_()  # z is not needed again: its buffer becomes e, then the gradient
            e_s = e.gather(-1, s)
            e.scatter_(-1, s, 0.0)
            sum_tail = e.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            sum_head = e_s.sum(-1)
            total = sum_head + sum_tail
            log_total = total.log()
            log_head, log_tail = sum_head.log() - log_total, sum_tail.log() - log_total
            kd_sum += _bucket_kl(log_p[rows], log_r[rows], kept, log_head, log_tail, temperature).sum()
            ce_sum += (m[:, 0] + log_total - label_logit).sum()
            if not (needs_hidden or needs_weight):
                continue
            head_p = log_p[rows].logsumexp(-1).exp()
            off_s = (1 - alpha) + alpha * (1 - torch.exp(log_r[rows] - log_tail))
            on_s = (1 - alpha) + alpha * (1 - torch.exp(head_p.log() - log_head))
            soft = torch.softmax(kept / temperature, -1) - torch.softmax(log_p[rows] / temperature, -1)
            e.mul_((off_s / total)[:, None])
            e.scatter_(-1, s, e_s * (on_s / total)[:, None] + alpha * temperature * head_p[:, None] * soft)
            e.scatter_add_(-1, y, torch.full_like(y, alpha - 1.0, dtype=torch.float32))
            e.mul_(1 / denominator)
            if grad_hidden is not None:
                grad_hidden[rows] = e.to(hidden.dtype) @ matrix
            if grad_weight is not None:
                grad_weight.addmm_(e.T, h.float())
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        kd, ce = kd_sum / denominator, ce_sum / denominator
        ctx.mark_non_differentiable(kd, ce)
        return alpha * kd + (1 - alpha) * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if grad_hidden is None else grad_hidden * scale,
            None if grad_weight is None else grad_weight * scale,
            *[None] * 8,
        )
