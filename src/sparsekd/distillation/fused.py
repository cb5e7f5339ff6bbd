"""The loss fused with the output projection: a chunk of logits at a time, with its gradient worked out at once.

What a loss is, and its modes, are in `losses.py`; here is how its gradient spreads over the vocabulary.

Shape letters: N positions, n positions of one chunk, D hidden size, V vocabulary, W rows of the output weight, K kept
tokens.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.distillation.losses import IGNORED, Loss, Mode, Number, kd_and_ce, prepared, temperatures_of, valid
from sparsekd.models import add_product, product
from sparsekd.teacher import Samples, Targets

_CHUNK, _CHUNK_ON_CPU = 2048, 256  # positions whose logits are held at once; few leave a GPU waiting for memory


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
    weights: Float[Tensor, " N"] | None = None,
    chunk_size: int | None = None,
    checked: bool = False,
    compiled: bool = False,
) -> Loss:
    """The loss of the logits `softcap tanh(scale hidden @ weight.T / softcap)`, never more than a chunk of them.

    Rows of `weight` from `vocab_size` on are padding: no probability, no gradient. Memory above the inputs is
    `chunk_size` x V fp32 numbers, and the gradients of what asks for one: the gradient is worked out here, in the
    forward pass, so backward only multiplies it by the incoming one. It can be called once. `weights` and `checked` as
    in `kd_loss`. `compiled`: what follows each product is made a few kernels, where it was ten passes over the logits.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not checked:
        weights = None if weights is None else weights[labels != IGNORED]
        hidden, labels, targets = valid(hidden, labels, targets, vocab_size)
    picks, teacher = prepared(labels, targets, mode, temperature, torch.float32)
    trains = torch.is_grad_enabled()
    grad_hidden = torch.empty_like(hidden) if trains and hidden.requires_grad else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if trains and weight.requires_grad else None
    if grad_weight is not None:
        grad_weight[vocab_size if len(hidden) else 0 :].zero_()  # the first chunk writes the others
    share = torch.full((), 1 / denominator, device=hidden.device)  # unlike a copied number: no wait for the device
    numbers = _Numbers(share, alpha, temperature, scale, softcap)
    tempered = len(temperatures_of(mode, temperature)) > 1
    # what the chunk's step holds: the logits, their softmax at another temperature, the slope of the cap
    on_cpu = hidden.device.type == "cpu"
    chunk_size = chunk_size or (_CHUNK_ON_CPU if on_cpu else _CHUNK)
    num_rows = max(1, chunk_size // (1 + tempered + (softcap is not None)))
    likeliest: list[Tensor] = []
    gaps: list[Tensor] = []
    sums = torch.zeros(2, device=hidden.device)
    step = (_compiled_step if compiled else _plain_step)(numbers, mode, tempered, weights is not None)
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
            gradient, found, gap = step(z, picks[part], chunk_teacher, None if weights is None else weights[part])
            sums += found
            if not trains:
                gaps.append(gap)
            low = gradient.to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (low @ matrix).to(h.dtype)  # under autocast it is bf16
            if grad_weight is not None:
                add_product(grad_weight[:vocab_size], low.T, h, is_first=start == 0)
            del gradient, low  # before the next chunk's is made: two would be there at once
    kd, ce = sums / denominator
    total = alpha * kd + (1 - alpha) * ce
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    total: Tensor = _WithGradients.apply(total, hidden, weight, grad_hidden, grad_weight)  # type: ignore[assignment]
    if trains:
        return Loss(total, kd, ce)
    return Loss(total, kd, ce, torch.cat([labels[:0], *likeliest]), torch.cat([sums[:0], *gaps]))


class _Numbers(NamedTuple):
    """What the losses of a chunk are worked out with."""

    share: Float[Tensor, ""]  # of a position in the whole batch
    alpha: Number
    temperature: Number
    scale: Number
    softcap: Number | None


def _chunk(
    z: Float[Tensor, "n V"],
    picks: Int[Tensor, "n picks"],
    teacher: Targets | Samples,
    weights: Float[Tensor, " n"] | None,
    numbers: _Numbers,
    mode: Mode,
    tempered: bool,
) -> tuple[Float[Tensor, "n V"], Float[Tensor, " terms"], Float[Tensor, " n"]]:
    """From the products `h @ weight.T`, which it overwrites, their gradient, the sums of KD and CE, and each KD.

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

    def loss(picked: Tensor, log_rest: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        kd, ce = kd_and_ce(picked, log_rest, teacher, mode, temperature, num_tail)
        found = torch.stack([(kd if weights is None else weights * kd).sum(), ce.sum()])
        return share * scale * (alpha * found[0] + (1 - alpha) * found[1]), (found, kd)

    (of_picked, of_rest), (found, gap) = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(picked, sums.log())
    gradient = exps[0].mul_(of_rest[:, :1] / sums[:, :1])
    if tempered:
        gradient.addcmul_(exps[1], of_rest[:, 1:] / (sums[:, 1:] * temperature))
    gradient.scatter_add_(-1, picks, of_picked)
    return gradient if slope is None else gradient.mul_(slope), found, gap


def _scale_and_cap(z: Float[Tensor, "n V"], scale: Number, softcap: Number | None) -> Float[Tensor, "n V"] | None:
    """Makes logits of `z` in place; the slope of the cap, 1 - tanh^2, if there is one."""
    if softcap is None:
        if isinstance(scale, Tensor) or scale != 1:
            z.mul_(scale)
        return None
    z.mul_(scale / softcap).tanh_()
    slope = z.square().neg_().add_(1)
    z.mul_(softcap)
    return slope


def _plain_step(
    numbers: _Numbers, mode: Mode, tempered: bool, weighted: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return functools.partial(_chunk, numbers=numbers, mode=mode, tempered=tempered)


def _compiled_step(
    numbers: _Numbers, mode: Mode, tempered: bool, weighted: bool, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_chunk`, compiled."""
    alpha, temperature, scale, softcap = (  # as they are they would be compiled in
        None if number is None else torch.full_like(numbers.share, number)  # type: ignore[arg-type]
        for number in numbers[1:]
    )
    step = _compiled(mode, tempered, softcap is not None, weighted, backend)
    numbers = _Numbers(numbers.share, alpha, temperature, scale, softcap)  # type: ignore[arg-type]
    return functools.partial(step, numbers=numbers, mode=mode, tempered=tempered)


@functools.cache
def _compiled(
    mode: Mode, tempered: bool, capped: bool, weighted: bool, backend: str | Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_chunk` compiled for logits of one structure; not compiled, and saying so, where torch cannot or will not.

    It is a function of its own: torch limits how often the code of a function is compiled.
    """
    code = _chunk.__code__.replace(co_name=f"_chunk_{mode}_{tempered}_{capped}_{weighted}")
    chosen = torch.compile(types.FunctionType(code, globals()), backend=backend, fullgraph=True)

    def step(*given: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
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
