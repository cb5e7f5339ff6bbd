"""Which neurons of an MLP to take out, and how the others make up for it.

An MLP writes `W z`, z the values of its I neurons. With the second moment `C = E[z z^T]` and the curvature G of the KL
at the output, taking out the set S and letting the other neurons make up for it as well as they can costs, in nats,

    1/2 tr(W_S^T G W_S ((C^-1)_SS)^-1)        and leaves        W' = W C_:K (C_KK)^-1

for the set K that is kept, whatever G is (optimal brain surgeon, Hassibi and Stork 1993, for whole columns of a
matrix; the metric as in Kronecker-factored curvature). Which set is cheapest is found greedily, some at a time: the
neurons of the lowest `w_j^T G w_j / (C^-1)_jj`, whose removal changes W and C^-1 for those that follow.

Shape letters: I neurons, H hidden size, K kept neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.errors import DataError

RIDGE = 1e-3  # of the mean of C's diagonal: what the sample of text does not determine is left small
_STEPS = 96  # in so many a removal is decided, some neurons at a time


@dataclass(frozen=True)
class Removal:
    """The order in which neurons go, the cheapest first, and what it costs."""

    order: Int[Tensor, " I"]
    losses: Float[Tensor, " I+1"]  # entry n: the loss with the first n of `order` taken out

    def kept(self, count: int) -> Int[Tensor, " K"]:
        """The `count` neurons that go last, ascending."""
        return self.order[len(self.order) - count :].sort().values


def removal(
    weight: Float[Tensor, "H I"],
    gram: Float[Tensor, "I I"],
    metric: Float[Tensor, "H H"],
    ridge: float = RIDGE,
) -> Removal:
    """The greedy order of all neurons of one MLP; `metric` is positive definite, everything float64.

    Within a step the loss is shared out evenly. Raises `DataError` when the damped Gram has no inverse.
    """
    count = len(gram)
    inverse = torch.cholesky_inverse(_factor(gram, ridge))
    values, vectors = torch.linalg.eigh(metric)
    scaled = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight  # G^1/2 W
    alive = torch.arange(count, device=gram.device)
    order, steps = [], []
    size = -(-count // _STEPS)
    while len(alive):
        scores = scaled.square().sum(0) / inverse.diagonal()
        least = scores.argsort(stable=True)[:size]
        factor = torch.linalg.cholesky(inverse[least[:, None], least])
        lost = torch.linalg.solve_triangular(factor, scaled[:, least].T, upper=False)
        steps.append((lost.square().sum() / 2 / len(least)).expand(len(least)))
        order.append(alive[least])
        cross = torch.linalg.solve_triangular(factor, inverse[least], upper=False)
        left = len(alive) - len(least)
        free, moved = _places(least, left)
        for values, dim in ((inverse, 0), (inverse, 1), (cross, 1), (scaled, 1), (alive, 0)):
            values.index_copy_(dim, free, values.narrow(dim, left, len(least)).index_select(dim, moved))
        alive, cross = alive[:left], cross[:, :left]
        inverse = inverse[:left, :left].addmm_(cross.T, cross, alpha=-1)
        scaled = scaled[:, :left].addmm_(lost.T, cross, alpha=-1)
    losses = torch.cat([torch.zeros(1, dtype=gram.dtype, device=gram.device), *steps]).cumsum(0)
    return Removal(torch.cat(order), losses)


def _places(gone: Int[Tensor, " G"], left: int) -> tuple[Tensor, Tensor]:
    """Of `left` neurons and those that are `gone`: the places below `left` that become free, and which of
    those from `left` on move there. Nothing else moves, which would cost more than all products."""
    above = torch.arange(len(gone), device=gone.device)
    return gone[gone < left], above[~torch.isin(above + left, gone)]


def refitted(
    target: Float[Tensor, "H K"], gram: Float[Tensor, "K K"], start: Float[Tensor, "H K"], ridge: float = RIDGE
) -> Float[Tensor, "H K"]:
    """The columns W' for the kept neurons: `W' C_KK = E[t z_K^T]` for the outputs t that are wanted, with the ridge
    drawing them to `start`. Everything float64; raises `DataError` as `removal`."""
    missing = target - start @ gram
    return start + torch.cholesky_solve(missing.T, _factor(gram, ridge)).T


def _factor(gram: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a Gram with its ridge."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise DataError("the neurons' second moments have no inverse")
    return factor
