"""The compressed formats: what replaces a dense linear layer. Knows no model code.

Every format writes the same matrices, W = up @ down of rank R. `lowrank` stores both factors. The pivot formats store
R rows or R columns of W itself and the others as combinations of them, which saves R^2 numbers, so full rank costs
exactly the dense layer (PIFA, Zhao et al., arXiv 2502.18139). Their pivots are the first R rows or columns: inside an
MLP the neurons can be put in any order, so an order that suits all its matrices (`common_pivots`) is written into the
weights and costs nothing when the model runs.

Shape letters: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsekd.device import in_float64

_NOTHING = 1e-7  # share of the largest singular value: what float32's rounding makes
_LARGEST_COEFFICIENT = 1e3  # larger ones make rounding errors of float32 seen: such pivots are all but dependent


class CompressedLinear(nn.Module):
    """What the formats share; each says how it is made `from_factors` and gives its `factors` back."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> CompressedLinear:
        """The layer of `up @ down`, exact up to rounding."""
        raise NotImplementedError

    def factors(self) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        """`up`, `down` whose product is the layer's matrix."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """`y = up(down(x))`: `R (I + O)` weights. The bias, if any, belongs to `up`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> LowRankLinear:
        with torch.device("meta"):
            layer = cls(*_sizes(up, down), bias is not None)
        layer.down.weight, layer.up.weight = _parameter(down), _parameter(up)
        if bias is not None:
            layer.up.bias = _parameter(bias)
        return layer

    def factors(self) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        return self.up.weight, self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class RowPivotLinear(CompressedLinear):
    """The first R outputs are computed, `z = pivots(x)`, the others are combinations of them: `y = [z, rest(z)]`.

    `R (I + O) - R^2` weights. For the matrices that write an MLP's neurons (gate, up).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.pivots = nn.Linear(in_features, rank, bias=False)
        self.rest = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> RowPivotLinear:
        rank, exact = down.shape[0], in_float64(up)
        pivots = exact[:rank]
        rest = _combinations(pivots, exact[rank:])
        with torch.device("meta"):
            layer = cls(*_sizes(up, down), bias is not None)
        layer.pivots.weight = _parameter((pivots @ in_float64(down)).to(down))
        layer.rest.weight = _parameter(rest.to(up))
        if bias is not None:
            layer.bias = _parameter(bias)
        return layer

    def factors(self) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        return torch.cat([_identity(self.rest.weight, self.rank), self.rest.weight]), self.pivots.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._writes_in_place(x):
            y = x.new_empty(*x.shape[:-1], self.out_features)
            flat = y.view(-1, self.out_features)
            z, others = flat[:, : self.rank], flat[:, self.rank :]
            torch.mm(x.reshape(-1, self.in_features), self.pivots.weight.T, out=z)
            torch.mm(z, self.rest.weight.T, out=others)
        else:
            z = self.pivots(x)
            y = torch.cat([z, self.rest(z)], dim=-1)
        return y if self.bias is None else y + self.bias

    def _writes_in_place(self, x: Tensor) -> bool:
        """Whether both products may be written straight to their place: no autograd, no tracer, no adapter around, and
        no hook that would have to see the inner layers called, as off-loading's, which fetches their weights."""
        plain = _is_plain(self.pivots) and _is_plain(self.rest)
        traced = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        return plain and not traced and not torch.is_grad_enabled()


class ColumnPivotLinear(CompressedLinear):
    """The first R inputs are taken as they are, the others only add to them: `y = pivots(x[:R] + rest(x[R:]))`.

    `R (I + O) - R^2` weights. For the matrix that reads an MLP's neurons (down).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, rank)
        self.rest = nn.Linear(in_features - rank, rank, bias=False)
        self.pivots = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "O R"], down: Float[Tensor, "R I"], bias: Float[Tensor, " O"] | None = None
    ) -> ColumnPivotLinear:
        rank, exact = down.shape[0], in_float64(down)
        pivots = exact[:, :rank]
        rest = _combinations(pivots.T, exact[:, rank:].T).T
        with torch.device("meta"):
            layer = cls(*_sizes(up, down), bias is not None)
        layer.pivots.weight = _parameter((in_float64(up) @ pivots).to(up))
        layer.rest.weight = _parameter(rest.to(down))
        if bias is not None:
            layer.pivots.bias = _parameter(bias)
        return layer

    def factors(self) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        return self.pivots.weight, torch.cat([_identity(self.rest.weight, self.rank), self.rest.weight], dim=1)

    @property
    def bias(self) -> Tensor | None:
        return self.pivots.bias

    def forward(self, x: Tensor) -> Tensor:
        # not two slices: each would have a gradient of the whole width, zeros but for its part
        pivots, others = x.split([self.rank, self.in_features - self.rank], dim=-1)
        return self.pivots(pivots + self.rest(others))


FORMATS = ("pivot", "lowrank")


def layer_class(layer_format: str, reads_neurons: bool) -> type[CompressedLinear]:
    """The class of a format for a matrix that reads an MLP's neurons, or for one that writes them."""
    return {"lowrank": LowRankLinear, "pivot": ColumnPivotLinear if reads_neurons else RowPivotLinear}[layer_format]


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


def _combinations(pivots: Float[Tensor, "R R"], rows: Float[Tensor, "M R"]) -> Float[Tensor, "M R"]:
    """X with `X @ pivots = rows`, of the smallest numbers where the pivots are dependent."""
    found, failed = torch.linalg.solve_ex(pivots, rows, left=False)
    if not failed and found.abs().lt(_LARGEST_COEFFICIENT).all():
        return found
    return rows @ torch.linalg.pinv(pivots, rtol=_NOTHING)


def num_weights(in_features: int, out_features: int, rank: int, layer_format: str) -> int:
    """Weights of a layer of that format and rank, without its bias."""
    plain = rank * (in_features + out_features)
    return plain if layer_format == "lowrank" else plain - rank**2


def rank_for(in_features: int, out_features: int, budget: float, layer_format: str) -> int:
    """The largest rank, at least 1, whose layer has at most `budget` weights, a number up to that of the dense layer.

    For `pivot` it is the smaller root of `r (I + O) - r^2 = budget`.
    """
    total = in_features + out_features
    rank = budget / total if layer_format == "lowrank" else (total - math.sqrt(total**2 - 4 * budget)) / 2
    # the small term keeps a budget that is a whole number of ranks from losing one to rounding
    return max(1, int(rank + 1e-9))


def _sizes(up: Tensor, down: Tensor) -> tuple[int, int, int]:
    return down.shape[1], up.shape[0], down.shape[0]


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is nothing but its product; accelerate puts its hooks in place of `forward`."""
    hooked = layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooked


def _identity(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous())
