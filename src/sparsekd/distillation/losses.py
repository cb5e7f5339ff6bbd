"""KL to a truncated teacher plus cross-entropy, from logits or fused with the output projection.

The loss of a batch is the sum over its valid positions of `alpha KD + (1 - alpha) CE`, divided by `denominator`, the
number of valid positions of the whole global batch: micro batches, processes and padding leave the gradient as it is.
A position with the label -100 is left out of both terms.

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
those few numbers a position, so T^2 is inside; only its spreading over the vocabulary is written out, in `_chunk`.

Shape letters: N positions, n positions of one chunk, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.errors import DataError, UsageError
from sparsekd.models import add_product, product
from sparsekd.teacher import Samples, Targets

Mode = Literal["bucket", "paper", "exact_t", "sampled", "renorm_full"]

IGNORED = -100  # the label of a position that is left out, as in torch and transformers
_TEMPERED = {"exact_t", "renorm_full"}  # look at the whole vocabulary at T; the others temper kept tokens at most
_CHUNK, _CHUNK_ON_CPU = 2048, 256  # positions whose logits are held at once; few leave a GPU waiting for memory
_ZERO = -1e30  # the logarithm of zero: finite, so that 0 log(0/q) is 0 and not nan
_Number = float | Tensor


class Loss(NamedTuple):
    total: Float[Tensor, ""]  # differentiable
    kd: Float[Tensor, ""]  # sum of KD over positions / denominator
    ce: Float[Tensor, ""]  # sum of CE over positions / denominator
    likeliest: Int[Tensor, " N"] | None = None  # the student's token at each valid position; without gradient only


# ---- the modes


class _Logits(NamedTuple):
    """All that a mode sees of the student, at one temperature, up to a constant for each position."""

    kept: Float[Tensor, "n K"]
    log_tail: Float[Tensor, " n"]  # log-sum-exp of the other logits
    log_total: Float[Tensor, " n"]  # log-sum-exp of all logits
    num_tail: int  # how many others there are


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _bucket(teacher: Targets, student: _Logits, temperature: _Number) -> Float[Tensor, " n"]:
    """The KL's chain rule (Cover and Thomas, theorem 2.5.3): kept or tail at temperature 1, plus P times `_paper`."""
    log_head = teacher.log_probs.logsumexp(-1)
    log_student_head = student.kept.logsumexp(-1) - student.log_total
    between = _kl(log_head, log_student_head) + _kl(teacher.log_tail, student.log_tail - student.log_total)
    return between + log_head.exp() * _paper(teacher, student, temperature)


def _paper(teacher: Targets, student: _Logits, temperature: _Number) -> Float[Tensor, " n"]:
    """The method's paper read so that its fixed point is right: p^(1/T) renormalised on S, and so the student.

    T^2 keeps the gradient's size (Hinton, Vinyals and Dean 2015, section 2.1). Says nothing of the mass on S.
    """
    soft_teacher = F.log_softmax(teacher.log_probs / temperature, -1)
    return temperature**2 * _kl(soft_teacher, F.log_softmax(student.kept / temperature, -1)).sum(-1)


def _exact_t(teacher: Targets, student: _Logits, temperature: _Number) -> Float[Tensor, " n"]:
    """The (k+1)-way KL of both distributions tempered over the whole vocabulary; `student` is at `temperature`.

    The tail's sum of p^a, a = 1/T, is interpolated in its logarithm by the quadratic through a = 0 (a count), 1/2 and
    1: exact at temperatures 1 and 2. One token that stands for the tail, r^(1/T), would be far too little.
    """
    a = 1 / temperature
    log_count = math.log(student.num_tail) if student.num_tail else _ZERO
    log_tail = (
        (1 - a) * (1 - 2 * a) * log_count + 4 * a * (1 - a) * teacher.log_tail_half + a * (2 * a - 1) * teacher.log_tail
    )
    log_kept = teacher.log_probs / temperature
    log_total = torch.logaddexp(log_kept.logsumexp(-1), log_tail)
    kept = _kl(log_kept - log_total[:, None], student.kept - student.log_total[:, None]).sum(-1)
    return temperature**2 * (kept + _kl(log_tail - log_total, student.log_tail - student.log_total))


def _sampled(teacher: Samples, student: _Logits, temperature: _Number) -> Float[Tensor, " n"]:
    """Importance-sampled KL (Anshumann et al. 2025, arXiv 2503.16870): its gradient q - w is q - p on average."""
    return _kl(teacher.log_weights, student.kept - student.log_total[:, None]).sum(-1)


def _renorm_full(teacher: Targets, student: _Logits, temperature: _Number) -> Float[Tensor, " n"]:
    """Kept tokens renormalised against the full softmax (DistillKit's `zero`): least where the student has no tail."""
    soft_teacher = F.log_softmax(teacher.log_probs / temperature, -1)
    return temperature**2 * _kl(soft_teacher, student.kept - student.log_total[:, None]).sum(-1)


_KD: dict[Mode, Callable[[Any, _Logits, _Number], Tensor]] = {
    "bucket": _bucket,
    "paper": _paper,
    "exact_t": _exact_t,
    "sampled": _sampled,
    "renorm_full": _renorm_full,
}


def _kd_and_ce(
    picked: Float[Tensor, "n picks"],
    log_rest: Float[Tensor, "n temperatures"],
    teacher: Targets | Samples,
    mode: Mode,
    temperature: _Number,
    num_tail: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Both terms, from the logits of the kept tokens and of the label, and the log-sum-exp of the rest.

    `log_rest` is at temperature 1 first and at the mode's last. Samples may repeat an id, so there it is over all.
    """
    kept, label = picked[:, :-1], picked[:, -1]

    def at(temperature: _Number, log_tail: Tensor) -> _Logits:
        log_head = (kept / temperature).logsumexp(-1)
        log_total = log_tail if isinstance(teacher, Samples) else torch.logaddexp(log_head, log_tail)
        return _Logits(kept / temperature, log_tail, log_total, num_tail)

    student = at(1.0, log_rest[:, 0])
    seen = at(temperature, log_rest[:, -1]) if mode in _TEMPERED else student
    return _KD[mode](teacher, seen, temperature), student.log_total - label


def _temperatures(mode: Mode, temperature: float) -> tuple[float, ...]:
    """Those at which the log-sum-exp over the vocabulary is needed; 1 is, for the cross-entropy."""
    return (1.0, temperature) if mode in _TEMPERED and temperature != 1 else (1.0,)


# ---- what both implementations start with


def require_valid(labels: Int[Tensor, " N"], targets: Targets | Samples, vocab_size: int) -> None:
    """Raises `DataError` for an id outside the vocabulary or kept twice, which a sort of K ids a position finds."""
    ids = torch.cat([targets.ids, labels[:, None]], -1)
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise DataError(f"the targets or labels name a token outside the student's vocabulary of {vocab_size}")
    if isinstance(targets, Targets) and bool((targets.ids.sort(-1).values.diff(dim=-1) == 0).any()):
        raise DataError("the targets keep a token twice at one position; make the cache again with --fresh")


def _valid(
    states: Float[Tensor, "N _"], labels: Int[Tensor, " N"], targets: Targets | Samples, vocab_size: int
) -> tuple[Float[Tensor, "n _"], Int[Tensor, " n"], Targets | Samples]:
    """What all three are without the positions that are left out."""
    rows = (labels != IGNORED).nonzero()[:, 0]
    labels, targets = labels[rows], type(targets)(*(value[rows] for value in targets))
    require_valid(labels, targets, vocab_size)
    return states[rows], labels, targets


def _prepared(
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
    values = [value.to(dtype).clamp_min(_ZERO) for value in targets[1:]]
    if isinstance(targets, Samples):
        return picks, Samples(targets.ids, F.log_softmax(values[0], -1).clamp_min(_ZERO))
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
    checked: bool = False,
) -> Loss:
    """The loss from full logits, through autograd: the reference, and the way for heads of a shape of their own.

    `checked`: no label is -100, and `require_valid` has seen the rest. To ask the tensors themselves would make the
    host wait for the device.
    """
    if not checked:
        logits, labels, targets = _valid(logits, labels, targets, logits.shape[-1])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picks, teacher = _prepared(labels, targets, mode, temperature, z.dtype)
    rest = z if isinstance(teacher, Samples) else z.scatter(-1, teacher.ids, _ZERO)
    log_rest = torch.stack([(rest / t).logsumexp(-1) for t in _temperatures(mode, temperature)], -1)
    num_tail = z.shape[-1] - teacher.ids.shape[-1]
    kd, ce = _kd_and_ce(z.gather(-1, picks), log_rest, teacher, mode, temperature, num_tail)
    kd, ce = kd.sum() / denominator, ce.sum() / denominator
    likeliest = None if torch.is_grad_enabled() else z.argmax(-1)
    return Loss(alpha * kd + (1 - alpha) * ce, kd.detach(), ce.detach(), likeliest)


# ---- the same, fused with the output projection


def linear_kd_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    labels: Int[Tensor, " N"],
    targets: Targets | Samples,
    *,
    mode: Mode = "bucket",
    alpha: float,
    temperature: float,
    denominator: int | float,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    checked: bool = False,
    compiled: bool = False,
) -> Loss:
    """The loss of the logits `softcap tanh(scale hidden @ weight.T / softcap)`, never more than a chunk of them.

    Rows of `weight` from `vocab_size` on are padding: no probability, no gradient. Memory above the inputs is
    `chunk_size` x V fp32 numbers, and the gradients of what asks for one: the gradient is worked out here, in the
    forward pass, so backward only multiplies it by the incoming one. It can be called once. `checked` as in `kd_loss`.
    `compiled`: what follows each product is made a few kernels, where it was ten passes over the logits.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not checked:
        hidden, labels, targets = _valid(hidden, labels, targets, vocab_size)
    picks, teacher = _prepared(labels, targets, mode, temperature, torch.float32)
    trains = torch.is_grad_enabled()
    grad_hidden = torch.empty_like(hidden) if trains and hidden.requires_grad else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains and weight.requires_grad else None
    share = torch.full((), 1 / denominator, device=hidden.device)  # unlike a copied number: no wait for the device
    numbers = _Numbers(share, alpha, temperature, scale, softcap)
    tempered = len(_temperatures(mode, temperature)) > 1
    # what the chunk's step holds: the logits, their softmax at another temperature, the slope of the cap
    on_cpu = hidden.device.type == "cpu"
    chunk_size = chunk_size or (_CHUNK_ON_CPU if on_cpu else _CHUNK)
    num_rows = max(1, chunk_size // (1 + tempered + (softcap is not None)))
    likeliest: list[Tensor] = []
    sums = torch.zeros(2, device=hidden.device)
    step = (
        _compiled_step(numbers, mode, tempered)
        if compiled
        else functools.partial(_chunk, numbers=numbers, mode=mode, tempered=tempered)
    )
    with torch.no_grad():
        matrix = weight[:vocab_size].to(hidden.dtype)
        memory = sums.new_empty(vocab_size * min(num_rows, len(hidden)))  # of every chunk's logits in turn
        for start in range(0, len(hidden), num_rows):
            part = slice(start, start + num_rows)
            h = hidden[part]
            chunk_teacher = type(teacher)(*(value[part] for value in teacher))
            z = memory[: vocab_size * len(h)]  # on a CPU a product is faster with the vocabulary as rows
            z = z.view(vocab_size, len(h)).T if on_cpu else z.view(len(h), vocab_size)
            product(matrix, h.T, out=z.T)
            if not trains:
                likeliest.append(z.argmax(-1))
            gradient, found = step(z, picks[part], chunk_teacher)
            sums += found
            low = gradient.to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (low @ matrix).to(h.dtype)  # under autocast it is bf16
            if grad_weight is not None:
                add_product(grad_weight[:vocab_size], low.T, h)
            del gradient, low  # before the next chunk's is made: two would be there at once
    kd, ce = sums / denominator
    total = alpha * kd + (1 - alpha) * ce
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    total: Tensor = _WithGradients.apply(total, hidden, weight, grad_hidden, grad_weight)  # type: ignore[assignment]
    return Loss(total, kd, ce, None if trains else torch.cat([labels[:0], *likeliest]))


class _Numbers(NamedTuple):
    """What the losses of a chunk are worked out with."""

    share: Float[Tensor, ""]  # of a position in the whole batch
    alpha: _Number
    temperature: _Number
    scale: _Number
    softcap: _Number | None


def _chunk(
    z: Float[Tensor, "n V"],
    picks: Int[Tensor, "n picks"],
    teacher: Targets | Samples,
    numbers: _Numbers,
    mode: Mode,
    tempered: bool,
) -> tuple[Float[Tensor, "n V"], Float[Tensor, " terms"]]:
    """From the products `h @ weight.T`, which it overwrites, their gradient, and the sums of KD and CE.

    With e = exp((z - m)/T) over the rest, s its sum, and g the gradient for its logarithm, which a few numbers a
    position decide, the gradient for a logit of the rest is g e / (s T). The rest is summed itself: 1 - Q cancels.
    At T = 1 it is e^T: one exponential serves both temperatures, where it is `tempered` at all.
    """
    share, alpha, temperature, scale, softcap = numbers
    slope = _scale_and_cap(z, scale, softcap)
    picked, m = z.gather(-1, picks), z.amax(-1, keepdim=True)
    picked = picked - m
    z.sub_(m)
    if tempered:
        z.div_(temperature)
    z.exp_()
    if not isinstance(teacher, Samples):
        z.scatter_(-1, teacher.ids, 0.0)
    exps = [z.pow(temperature), z] if tempered else [z]
    sums = torch.stack([e.sum(-1) for e in exps], -1).clamp_min(torch.finfo(z.dtype).tiny)
    num_tail = z.shape[-1] - teacher.ids.shape[-1]

    def loss(picked: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
        kd, ce = _kd_and_ce(picked, log_rest, teacher, mode, temperature, num_tail)
        found = torch.stack([kd.sum(), ce.sum()])
        return share * scale * (alpha * found[0] + (1 - alpha) * found[1]), found

    (of_picked, of_rest), found = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(picked, sums.log())
    gradient = exps[0].mul_(of_rest[:, :1] / sums[:, :1])
    if tempered:
        gradient.addcmul_(exps[1], of_rest[:, 1:] / (sums[:, 1:] * temperature))
    gradient.scatter_add_(-1, picks, of_picked)
    return gradient if slope is None else gradient.mul_(slope), found


def _scale_and_cap(z: Float[Tensor, "n V"], scale: _Number, softcap: _Number | None) -> Float[Tensor, "n V"] | None:
    """Makes logits of `z` in place; the slope of the cap, 1 - tanh^2, if there is one."""
    if softcap is None:
        if isinstance(scale, Tensor) or scale != 1:
            z.mul_(scale)
        return None
    z.mul_(scale / softcap).tanh_()
    slope = z.square().neg_().add_(1)
    z.mul_(softcap)
    return slope


def _compiled_step(
    numbers: _Numbers, mode: Mode, tempered: bool, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_chunk`, compiled."""
    alpha, temperature, scale, softcap = (  # as they are they would be compiled in
        None if number is None else torch.full_like(numbers.share, number)  # type: ignore[arg-type]
        for number in numbers[1:]
    )
    step = _compiled(mode, tempered, softcap is not None, backend)
    numbers = _Numbers(numbers.share, alpha, temperature, scale, softcap)  # type: ignore[arg-type]
    return functools.partial(step, numbers=numbers, mode=mode, tempered=tempered)


@functools.cache
def _compiled(
    mode: Mode, tempered: bool, capped: bool, backend: str | Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_chunk` compiled for logits of one structure; not compiled, and saying so, where torch cannot or will not.

    It is a function of its own: torch limits how often the code of a function is compiled.
    """
    code = _chunk.__code__.replace(co_name=f"_chunk_{mode}_{tempered}_{capped}")
    chosen = torch.compile(types.FunctionType(code, globals()), backend=backend, fullgraph=True)

    def step(*given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        nonlocal chosen
        try:
            return chosen(*given, **settings)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            warnings.warn(f"the loss is not compiled from here on, which is slower: {error}", stacklevel=2)
            chosen = _chunk
            return step(*given, **settings)

    return step


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        hidden: Tensor,
        weight: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # in place: a copy of the weight's gradient would double the peak; autograd then refuses a second backward
        gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.saved_tensors]
        return None, *gradients, None, None
