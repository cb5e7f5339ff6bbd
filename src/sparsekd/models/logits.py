"""The output projection with sums and result in float32, whatever the number format of the model.

A projection in bfloat16 rounds the logits to eight bits: half a thousandth of a nat of noise in what a cache, a loss or
a perplexity says, and other likeliest tokens at 2 to 4 % of the positions. Hidden states and matrix stay what they are.

Shape letters: B blocks, L positions, N positions of all blocks, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsekd.device import rounded_factors

_ROWS = 4096  # of a matrix that are made float32 at once, where no product of lower precision gives float32
_GIVES_FLOAT32 = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None  # on a GPU


def logits_of(model: Any, **inputs: Any) -> Float[Tensor, "B L V"]:
    """The logits of `model`, whose output projection is in float32, and so are scale and cap, which follow it."""
    with float32_head(model):
        return model(**inputs, use_cache=False).logits


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """The output projection gives float32; it is left alone where it does anyway."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or _number_format(head, model.device.type).itemsize >= 4:
        yield
        return
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"  # accelerate's hook calls the first
    replaced = head.__dict__.get(name)
    setattr(head, name, functools.partial(_forward, head))
    try:
        yield
    finally:
        delattr(head, name)
        if replaced is not None:
            setattr(head, name, replaced)


def project(hidden: Float[Tensor, "N D"], matrix: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
    """`hidden @ matrix.T` in float32, of factors in float32 or in a lower precision; it can be differentiated."""
    if hidden.dtype == matrix.dtype == torch.float32:
        return hidden @ matrix.T
    return _Project.apply(hidden, matrix)  # type: ignore[return-value]


def product(matrix: Float[Tensor, "V D"], columns: Float[Tensor, "D N"], out: Float[Tensor, "V N"]) -> None:
    """Writes `matrix @ columns`, which are of one number format, to `out`, which is float32."""
    if matrix.dtype == torch.float32:
        torch.mm(matrix, columns, out=out)
    elif matrix.is_cuda and _GIVES_FLOAT32:
        torch.mm(matrix, columns, out_dtype=torch.float32, out=out)
    else:
        columns = columns.float()
        with rounded_factors(matrix.dtype == torch.bfloat16):
            for rows, found in zip(matrix.split(_ROWS), out.split(_ROWS), strict=True):
                torch.mm(rows.float(), columns, out=found)


def add_product(
    out: Float[Tensor, "A B"], a: Float[Tensor, "A N"], b: Float[Tensor, "N B"], is_first: bool = False
) -> None:
    """Adds `a @ b`, which are of one number format, to `out`, which is float32; `is_first` writes it there."""
    beta = 0 if is_first else 1
    if a.dtype != torch.float32 and a.is_cuda and _GIVES_FLOAT32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out, beta=beta)
    else:
        with rounded_factors(a.dtype == torch.bfloat16):
            out.addmm_(a.float(), b.float(), beta=beta)


class _Project(torch.autograd.Function):
    """The gradient of the hidden states is a product in their number format; that of the matrix sums in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor) -> Tensor:
        low = matrix.to(hidden.dtype)
        ctx.save_for_backward(hidden, low)
        logits = hidden.new_empty(len(hidden), len(low), dtype=torch.float32)
        product(low, hidden.T, out=logits.T)
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, low = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return upstream.to(low.dtype) @ low if wanted[0] else None, upstream.T @ hidden.float() if wanted[1] else None


def _forward(head: nn.Linear, x: Tensor) -> Tensor:
    hidden, number_format = x.flatten(0, -2), _number_format(head, x.device.type)
    if x.device.type == "cpu" and head.weight.dtype == torch.float32:
        with torch.autocast("cpu", enabled=False), rounded_factors(number_format == torch.bfloat16):
            logits = hidden.float() @ head.weight.T
    else:
        logits = project(hidden.to(number_format), head.weight)
    logits = logits.unflatten(0, x.shape[:-1])
    return logits if head.bias is None else logits + head.bias


def _number_format(head: nn.Linear, device_type: str) -> torch.dtype:
    """Of the factors of its product."""
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else head.weight.dtype
