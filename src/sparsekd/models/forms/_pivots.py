"""Pivots: rows of a matrix of rank R that the other rows are combinations of; the algebra of form `lowrank`.

Shape letters: I input features, O output features, M other rows, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.device import in_float64

_NOTHING = 1e-7  # share of the largest singular value: what float32's rounding makes
_LARGEST_COEFFICIENT = 1e3  # larger ones make rounding errors of float32 seen: such pivots are all but dependent


def common_pivots(matrices: Sequence[Float[Tensor, "O _"]]) -> Int[Tensor, " O"]:
    """An order of the rows whose first R_k rows are a well-conditioned basis of matrix k, for all matrices at once.

    Greedy: the next row is the one with the largest product, over the matrices that still need one, of what is left
    of it outside the rows taken before (pivoted Cholesky of each `Q Q^T`, Q an orthonormal basis of the columns).
    """
    bases = [_basis(in_float64(matrix)).float() for matrix in matrices]
    left = [basis.square().sum(1) for basis in bases]
    cholesky = [torch.zeros_like(basis).T.contiguous() for basis in bases]
    free = torch.zeros(len(bases[0]), device=bases[0].device)  # 0, or -inf for a row that is taken
    order = []
    for position in range(max(basis.shape[1] for basis in bases)):
        needing = [k for k, basis in enumerate(bases) if position < basis.shape[1]]
        chosen = int((free + sum(left[k].clamp_min(1e-12).log() for k in needing)).argmax())
        order.append(chosen)
        free[chosen] = -torch.inf
        for k in needing:
            known = cholesky[k][:position]
            column = bases[k] @ bases[k][chosen] - known.T @ known[:, chosen]
            cholesky[k][position] = column / left[k][chosen].clamp_min(1e-12).sqrt()
            left[k] = (left[k] - cholesky[k][position].square()).clamp_min(0)
    others = (free == 0).nonzero()[:, 0]
    return torch.cat([torch.tensor(order, dtype=torch.long, device=others.device), others]).to(matrices[0].device)


def _basis(matrix: Float[Tensor, "O R"]) -> Float[Tensor, "O _"]:
    """An orthonormal basis of what the columns span: of fewer directions than columns where these are dependent, as in
    a matrix of zeros, for which any rows will do."""
    basis, upper = torch.linalg.qr(matrix)
    diagonal = upper.diagonal().abs()
    if diagonal.min() > _NOTHING * diagonal.max():
        return basis
    basis, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return basis[:, values > _NOTHING * values[0]]


def combinations(pivots: Float[Tensor, "R R"], rows: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """X with `X @ pivots = rows`, of the smallest numbers where the pivots are dependent."""
    found, failed = torch.linalg.solve_ex(pivots, rows, left=False)
    if not failed and found.abs().lt(_LARGEST_COEFFICIENT).all():
        return found
    return rows @ torch.linalg.pinv(pivots, rtol=_NOTHING)
