"""KL to a truncated teacher plus cross-entropy, from logits; `fused.py` has the same without ever holding them all.

The loss of a batch is the sum over its valid positions of `alpha KD + (1 - alpha) CE`, divided by `denominator`, the
number of valid positions of the whole global batch: micro batches, processes and padding leave the gradient as it is.
A position with the label -100 is left out of both terms. KD may be weighted by position (`weighting.py`).

For one position, with the teacher's kept tokens S and their probabilities p, P = sum_S p, r = 1 - P, the student's
probabilities q, Q = sum_S q, Q_t its mass off S, and X_T a distribution X tempered to softmax(log X / T):

    bucket       P log(P/Q) + r log(r/Q_t) + P T^2 KL(p|S_T, q|S_T)        the default
    paper        T^2 KL(p|S_T, q|S_T)                                      the kept tokens among themselves only
    exact_t      T^2 [sum_S p_T log(p_T/q_T) + r_T log(r_T/Q_t,T)]         tempered over the whole vocabulary
    sampled      sum_S w log(w/q)                                          S drawn from the teacher, weighted w; T = 1
    renorm_full  T^2 sum_S p|S_T log(p|S_T / q_T)                          biased; for ablations

`bucket` follows from the chain rule KL = KL(kept or tail) + P KL(inside S) + r KL(inside the tail): the last term is
not in the cache, and only the second is tempered. At T = 1 it is the KL of the (k+1)-way coarsening, as `exact_t` is.
All but `renorm_full` have zero gradient where the student equals the teacher, `sampled` on average over draws; there
`renorm_full`, common elsewhere, still pushes the tail towards zero. The functions below give sources.

A mode is a function from the logits of S and the log-sum-exp of the rest to KD. Its gradient comes from autograd on
those few numbers a position, so T^2 is inside; only its spreading over the vocabulary is written out, in `fused.py`.

Shape letters: N positions, n of them that count, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.errors import DataError, UsageError
from sparsekd.teacher import Samples, Targets

Mode = Literal["bucket", "paper", "exact_t", "sampled", "renorm_full"]

IGNORED = -100  # the label of a position that is left out, as in torch and transformers
_TEMPERED = {"exact_t", "renorm_full"}  # look at the whole vocabulary at T; the others temper kept tokens at most
ZERO = -1e30  # the logarithm of zero: finite, so that 0 log(0/q) is 0 and not nan
Number = float | Tensor


class Loss(NamedTuple):
    total: Float[Tensor, ""]  # differentiable
    kd: Float[Tensor, ""]  # sum of KD, weighted where it is, over positions / denominator
    ce: Float[Tensor, ""]  # sum of CE over positions / denominator
    likeliest: Int[Tensor, " N"] | None = None  # the student's token at each valid position; without gradient only
    gaps: Float[Tensor, " N"] | None = None  # KD at each valid position, not weighted; without gradient only


# ---- the modes


class _Logits(NamedTuple):
    """All that a mode sees of the student, at one temperature, up to a constant for each position."""

    kept: Float[Tensor, "n K"]
    log_tail: Float[Tensor, " n"]  # log-sum-exp of the other logits
    log_total: Float[Tensor, " n"]  # log-sum-exp of all logits
    num_tail: int  # how many others there are


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _bucket(teacher: Targets, student: _Logits, temperature: Number) -> Float[Tensor, " n"]:
    """The KL's chain rule (Cover and Thomas, theorem 2.5.3): kept or tail at temperature 1, plus P times `_paper`."""
    log_head = teacher.log_probs.logsumexp(-1)
    log_student_head = student.kept.logsumexp(-1) - student.log_total
    between = _kl(log_head, log_student_head) + _kl(teacher.log_tail, student.log_tail - student.log_total)
    return between + log_head.exp() * _paper(teacher, student, temperature)


def _paper(teacher: Targets, student: _Logits, temperature: Number) -> Float[Tensor, " n"]:
    """The method's paper read so that its fixed point is right: p^(1/T) renormalised on S, and so the student.

    T^2 keeps the gradient's size (Hinton, Vinyals and Dean 2015, section 2.1). Says nothing of the mass on S.
    """
    soft_teacher = F.log_softmax(teacher.log_probs / temperature, -1)
    return temperature**2 * _kl(soft_teacher, F.log_softmax(student.kept / temperature, -1)).sum(-1)


def _exact_t(teacher: Targets, student: _Logits, temperature: Number) -> Float[Tensor, " n"]:
    """The (k+1)-way KL of both distributions tempered over the whole vocabulary; `student` is at `temperature`.

    The tail's sum of p^a, a = 1/T, is interpolated in its logarithm by the quadratic through a = 0 (a count), 1/2 and
    1: exact at temperatures 1 and 2. One token that stands for the tail, r^(1/T), would be far too little.
    """
    a = 1 / temperature
    log_count = math.log(student.num_tail) if student.num_tail else ZERO
    log_tail = (
        (1 - a) * (1 - 2 * a) * log_count + 4 * a * (1 - a) * teacher.log_tail_half + a * (2 * a - 1) * teacher.log_tail
    )
    log_kept = teacher.log_probs / temperature
    log_total = torch.logaddexp(log_kept.logsumexp(-1), log_tail)
    kept = _kl(log_kept - log_total[:, None], student.kept - student.log_total[:, None]).sum(-1)
    return temperature**2 * (kept + _kl(log_tail - log_total, student.log_tail - student.log_total))


def _sampled(teacher: Samples, student: _Logits, temperature: Number) -> Float[Tensor, " n"]:
    """Importance-sampled KL (Anshumann et al. 2025, arXiv 2503.16870): its gradient q - w is q - p on average."""
    return _kl(teacher.log_weights, student.kept - student.log_total[:, None]).sum(-1)


def _renorm_full(teacher: Targets, student: _Logits, temperature: Number) -> Float[Tensor, " n"]:
    """Kept tokens renormalised against the full softmax (DistillKit's `zero`): least where the student has no tail."""
    soft_teacher = F.log_softmax(teacher.log_probs / temperature, -1)
    return temperature**2 * _kl(soft_teacher, student.kept - student.log_total[:, None]).sum(-1)


_KD: dict[Mode, Callable[[Any, _Logits, Number], Tensor]] = {
    "bucket": _bucket,
    "paper": _paper,
    "exact_t": _exact_t,
    "sampled": _sampled,
    "renorm_full": _renorm_full,
}


def kd_and_ce(
    picked: Float[Tensor, "n picks"],
    log_rest: Float[Tensor, "n temperatures"],
    teacher: Targets | Samples,
    mode: Mode,
    temperature: Number,
    num_tail: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Both terms, from the logits of the kept tokens and of the label, and the log-sum-exp of the rest.

    `log_rest` is at temperature 1 first and at the mode's last. Samples may repeat an id, so there it is over all.
    """
    kept, label = picked[:, :-1], picked[:, -1]

    def at(temperature: Number, log_tail: Tensor) -> _Logits:
        log_head = (kept / temperature).logsumexp(-1)
        log_total = log_tail if isinstance(teacher, Samples) else torch.logaddexp(log_head, log_tail)
        return _Logits(kept / temperature, log_tail, log_total, num_tail)

    student = at(1.0, log_rest[:, 0])
    seen = at(temperature, log_rest[:, -1]) if mode in _TEMPERED else student
    return _KD[mode](teacher, seen, temperature), student.log_total - label


def temperatures_of(mode: Mode, temperature: float) -> tuple[float, ...]:
    """Those at which the log-sum-exp over the vocabulary is needed; 1 is, for the cross-entropy."""
    return (1.0, temperature) if mode in _TEMPERED and temperature != 1 else (1.0,)


# ---- what both implementations start with


def require_distinct(targets: Targets | Samples) -> None:
    """Raises `DataError` for an id that is kept twice, which a sort of K ids a position finds."""
    if isinstance(targets, Targets) and bool((targets.ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise DataError("the targets keep a token twice at one position; make the cache again with --fresh")


def valid(
    states: Float[Tensor, "N _"], labels: Int[Tensor, " N"], targets: Targets | Samples, vocab_size: int
) -> tuple[Float[Tensor, "n _"], Int[Tensor, " n"], Targets | Samples]:
    """What all three are without the positions that are left out. Raises `DataError` for an id outside the vocabulary
    or kept twice."""
    rows = (labels != IGNORED).nonzero()[:, 0]
    labels, targets = labels[rows], type(targets)(*(value[rows] for value in targets))
    ids = torch.cat([targets.ids, labels[:, None]], -1)
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise DataError(f"the targets or labels name a token outside the student's vocabulary of {vocab_size}")
    require_distinct(targets)
    return states[rows], labels, targets


def prepared(
    labels: Int[Tensor, " n"], targets: Targets | Samples, mode: Mode, temperature: float, dtype: torch.dtype
) -> tuple[Int[Tensor, "n picks"], Targets | Samples]:
    """The kept ids and the label, and the teacher rescaled to sum to one: a rounded cache does not.

    Raises `UsageError` when mode, temperature and kind of targets do not go together.
    """
    if isinstance(targets, Samples) != (mode == "sampled"):
        found = "sampled" if isinstance(targets, Samples) else "top-k"
        raise UsageError(
            f"distill.loss={mode} does not fit a cache of {found} targets: codec and loss `sampled` go together"
        )
    if mode == "sampled" and temperature != 1:
        raise UsageError(f"distill.loss=sampled works at temperature 1, not {temperature}: set distill.temperature=1")
    if mode == "exact_t" and temperature < 1:
        raise UsageError(f"distill.loss=exact_t knows the tail at temperatures from 1 on, not at {temperature}")
    picks = torch.cat([targets.ids, labels[:, None]], -1)
    values = [value.to(dtype).clamp_min(ZERO) for value in targets[1:]]
    if isinstance(targets, Samples):
        return picks, Samples(targets.ids, F.log_softmax(values[0], -1).clamp_min(ZERO))
    log_probs, log_tail, log_tail_half = values
    excess = torch.logaddexp(log_probs.logsumexp(-1), log_tail)
    return picks, Targets(targets.ids, log_probs - excess[:, None], log_tail - excess, log_tail_half - excess / 2)


# ---- the loss from logits


def kd_loss(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    targets: Targets | Samples,
    *,
    mode: Mode = "bucket",
    alpha: float,
    temperature: float,
    denominator: int | float,
    weights: Float[Tensor, " N"] | None = None,
    checked: bool = False,
) -> Loss:
    """The loss from full logits, through autograd: the reference, and the way for heads of a shape of their own.

    `weights`: of each position's KD; None: 1. `checked`: no label is -100, no id outside the vocabulary, and none kept
    twice. To ask the tensors themselves would make the host wait for the device.
    """
    if not checked:
        weights = None if weights is None else weights[labels != IGNORED]
        logits, labels, targets = valid(logits, labels, targets, logits.shape[-1])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picks, teacher = prepared(labels, targets, mode, temperature, z.dtype)
    rest = z if isinstance(teacher, Samples) else z.scatter(-1, teacher.ids, ZERO)
    log_rest = torch.stack([(rest / t).logsumexp(-1) for t in temperatures_of(mode, temperature)], -1)
    num_tail = z.shape[-1] - teacher.ids.shape[-1]
    kd, ce = kd_and_ce(z.gather(-1, picks), log_rest, teacher, mode, temperature, num_tail)
    seen = (None, None) if torch.is_grad_enabled() else (z.argmax(-1), kd)
    kd = kd if weights is None else weights * kd
    kd, ce = kd.sum() / denominator, ce.sum() / denominator
    return Loss(alpha * kd + (1 - alpha) * ce, kd.detach(), ce.detach(), *seen)
