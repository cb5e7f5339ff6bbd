"""The compressed formats: what replaces a dense linear layer. Knows no model code.

Shape letters: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`y = up(down(x))`: a linear layer of `rank * (in_features + out_features)` weights instead of their product.

    `down.weight` is R x I, `up.weight` O x R; the bias, if any, belongs to `up`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> LowRankLinear:
        """Takes the factors as they are, without a copy where device and dtype already fit."""
        with torch.device("meta"):
            layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None)
        layer.down.weight = nn.Parameter(down.contiguous())
        layer.up.weight = nn.Parameter(up.contiguous())
        if bias is not None:
            layer.up.bias = nn.Parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotLinear(nn.Module):
    """A rank-R layer of `R (I + O) - R^2` weights: R outputs are computed, the others are combinations of them.

    `pivots.weight` (R x I) gives the pivot outputs, `rest.weight` ((O - R) x R) the others from these; `order` puts
    them back in place. The same matrices can be written this way as in `LowRankLinear`, in fewer numbers, and full
    rank costs exactly the dense layer. The format is PIFA's (Zhao et al., arXiv 2502.18139).
    """

    order: Tensor  # output o is entry order[o] of (pivot outputs, other outputs)

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivots = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("order", torch.arange(out_features))

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> PivotLinear:
        """The layer of `up @ down`, exact up to rounding; `up` must have full column rank."""
        chosen, coefficients = dominant_rows(up.double())
        with torch.device("meta"):
            layer = cls(down.shape[1], up.shape[0], down.shape[0], bias is not None)
        pivots = up.double()[chosen] @ down.double()
        layer.pivots.weight = nn.Parameter(pivots.to(down.dtype))
        layer.rest.weight = nn.Parameter(coefficients[len(chosen) :].to(up.dtype))
        is_pivot = torch.zeros(len(up), dtype=torch.bool, device=up.device)
        is_pivot[chosen] = True
        layer.order = torch.cat([chosen, (~is_pivot).nonzero()[:, 0]]).argsort()
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        z = self.pivots(x)
        y = torch.cat([z, self.rest(z)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def dominant_rows(
    matrix: Float[Tensor, "O R"], tolerance: float = 2.0, max_swaps: int = 1000
) -> tuple[Int[Tensor, " R"], Float[Tensor, "O R"]]:
    """R rows that all rows are small combinations of: the rows' numbers, and the coefficients C of all rows.

    Returns C with the chosen rows first, then the others in their order, so that C[:R] is the identity and no entry
    exceeds `tolerance` (the maxvol iteration of Goreinov et al. 2010, started from LU with partial pivoting).
    """
    rank = matrix.shape[1]
    permutation = torch.linalg.lu(matrix)[0].argmax(0)  # row that ends up at each place
    chosen = permutation[:rank].clone()
    coefficients = torch.linalg.solve(matrix[chosen], matrix, left=False)  # C with matrix = C @ matrix[chosen]
    for _ in range(max_swaps):
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        pivot = coefficients[row, column]
        if float(pivot.abs()) <= tolerance:
            break
        chosen[column] = row
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients -= torch.outer(coefficients[:, column] / pivot, change)
    others = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    others[chosen] = False
    return chosen, torch.cat([coefficients[chosen], coefficients[others]])


FORMATS = {"lowrank": LowRankLinear, "pivot": PivotLinear}
CompressedLinear = LowRankLinear | PivotLinear


def num_weights(in_features: int, out_features: int, rank: int, layer_format: str) -> int:
    """Weights of a layer of that format and rank, without its bias and the pivot order, which is not a weight."""
    plain = rank * (in_features + out_features)
    return plain - rank**2 if layer_format == "pivot" else plain


def rank_for(in_features: int, out_features: int, budget: float, layer_format: str) -> int:
    """The largest rank, at least 1, whose layer has at most `budget` weights, a number up to that of the dense layer.

    For `pivot` it is the smaller root of `r (I + O) - r^2 = budget`.
    """
    total = in_features + out_features
    rank = (total - math.sqrt(total**2 - 4 * budget)) / 2 if layer_format == "pivot" else budget / total
    # the small term keeps a budget that is a whole number of ranks from losing one to rounding
    return max(1, int(rank + 1e-9))
