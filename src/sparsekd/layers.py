"""The compressed format: what replaces a dense linear layer. Knows no model code.

Shape letters: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
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
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, "O"] | None = None
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


def num_weights(in_features: int, out_features: int, rank: int) -> int:
    """Weights of a `LowRankLinear` without its bias."""
    return rank * (in_features + out_features)


def rank_for(in_features: int, out_features: int, reduction: float) -> int:
    """The largest rank, at least 1, whose `LowRankLinear` has at most `1 - reduction` of the dense weights."""
    budget = (1 - reduction) * in_features * out_features
    # the small term keeps a budget that is a whole number of ranks from losing one to rounding
    return max(1, int(budget / (in_features + out_features) + 1e-9))
